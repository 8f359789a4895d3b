# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What a request that reuses keys and values must return: oracle.py's networks, with stale ones.

A place that a step does not compute keeps the keys and values of the last step that did. Which
places those are is read off the ids: a step computes the canvas from the block that the step before
worked at, and the places before it that drew the most attention from the rows read last.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from oracle import Network, Run, dream_generate, llada_generate, plan_blocks, rms_norm
from sparse_oracle import Sparsity, over_places, select_blocks
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class Reuse:
    """share: of the places before the canvas's block;  every, refresh: in steps, None: never.

    choice: by what they are chosen: attention, match or both
    """

    share: float
    every: int = 1
    refresh: int | None = None
    choice: str = "attention"


@dataclass(frozen=True)
class Outline:
    """A request's shape, in places of its sequence.

    blocks: first place and most steps of each block;  shift: 1 where the row before predicts
    """

    num_prompt: int
    length: int
    block_length: int
    blocks: list[tuple[int, int]]
    mask_id: int
    shift: int

    def first_place(self, step: int) -> int:
        """Of the earliest block that `step` may work at."""
        for start, steps in self.blocks:
            if step < steps:
                return start
            step -= steps
        raise AssertionError("more steps than the request has")

    def places_read(self, ids: Tensor) -> Tensor:
        """The open places of the first block that has any."""
        masked = (ids == self.mask_id).nonzero()[:, 0]
        block = (masked - self.num_prompt) // self.block_length
        return masked[block == block[0]]


@dataclass(frozen=True)
class ReusingRun(Run):
    """A Run whose closest decision may also have been one between places, as in SparseRun.

    chosen: by step, the places that were chosen for their attention, ascending
    """

    chosen: list[list[int]] = field(default_factory=list, compare=False)


class ReusingNetwork:
    """The LogitsFn of one request: call number s is its step s.

    chosen: as in ReusingRun
    closest: the smallest ln(chosen / left) of two places' mass, of which one was chosen
    """

    def __init__(
        self, net: Network, reuse: Reuse, outline: Outline, sparsity: Sparsity | None = None
    ) -> None:
        self.net, self.reuse, self.outline, self.sparsity = net, reuse, outline, sparsity
        self.chosen: list[list[int]] = []
        self.closest = math.inf
        self.kept: list[tuple[Tensor, Tensor]] = []  # by layer, the keys and values of all places
        self.masks: list[Tensor] = []  # by layer, bool [num_heads, blocks, blocks]
        self.mass = torch.zeros(outline.length, dtype=torch.float64)
        self.seen: list[int] = []  # the ids when tokens of the prompt were last computed

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """ids [1, L] -> logits [1, L, vocab], NaN for places that are not computed."""
        net, step = self.net, len(self.chosen)
        first, chosen = self._choose(step, ids[0].tolist())
        self.chosen.append(chosen)
        if first == 0 or chosen:
            self.seen = ids[0].tolist()
        is_computed = torch.arange(ids.shape[1]) >= first
        is_computed[chosen] = True
        dense = torch.tensor(chosen, dtype=torch.long)  # of a sparse step
        read = self.outline.places_read(ids[0]) - self.outline.shift
        self.mass.zero_()
        x, recorded = net.embedding[ids[0]], []
        records = self._records_at(step)
        if records:
            self.masks = []
        for index, layer in enumerate(net.layers):
            q, k, v = net.heads(layer, rms_norm(x, layer.attn_norm, net.eps))
            if step == 0:
                self.kept.append((k, v))
            if records:
                canvas = self.outline.length - self.outline.num_prompt
                recorded.append(select_blocks(q, k, self.sparsity, canvas))
            stale = self.kept[index]
            k, v = (
                torch.where(is_computed[:, None], new, old)
                for new, old in zip((k, v), stale, strict=True)
            )
            self.kept[index] = (k, v)
            scores = q @ k.mT / math.sqrt(q.shape[-1])  # [num_heads, L, L]
            listed = self._listed(index, scores, dense)
            weights = (scores - listed.logsumexp(dim=-1, keepdim=True)).exp()
            self.mass += weights[:, read].sum(dim=(0, 1))
            attended = weights.masked_fill(listed == -math.inf, 0) @ v
            x = x + linear(attended.transpose(0, 1).flatten(1), *layer.o)
            x = x + layer.mlp(rms_norm(x, layer.mlp_norm, net.eps))
        for mask, leads in recorded:
            self.masks.append(mask)
            self.closest = min(self.closest, float(leads.min()))
        logits = linear(rms_norm(x, net.norm, net.eps), net.head) * net.logit_scale
        return logits.masked_fill(~is_computed[:, None], math.nan)[None]

    def _choose(self, step: int, ids: list[int]) -> tuple[int, list[int]]:
        """The first place from which on all are computed, and the chosen ones before it."""
        reuse = self.reuse
        is_whole = step == 0 or (reuse.refresh and step % reuse.refresh == 0)
        if is_whole or self._records_at(step):
            return 0, []
        first = self.outline.first_place(step - 1) - self.outline.shift
        if self.sparsity is not None:
            first -= first % self.sparsity.sizes[0]
        count = math.ceil(reuse.share * first)
        if count == 0 or step % reuse.every:
            return first, []
        scores = self._scores(first, ids)
        order = scores.argsort(descending=True, stable=True)
        if count < first and reuse.choice != "match":  # those are exact
            kept, left = scores[order[count - 1 : count + 1]].log().tolist()
            self.closest = min(self.closest, kept - left)
        return first, sorted(order[:count].tolist())

    def _records_at(self, step: int) -> bool:
        if self.sparsity is None:
            return False
        again = self.sparsity.refresh
        return step == 0 or (again is not None and step % again == 0)

    def _scores(self, first: int, ids: list[int]) -> Tensor:
        """What the places before `first` are chosen by, float64 [first]."""
        mass, prompt = self.mass[:first], ids[: min(first, self.outline.num_prompt)]
        filled = {new for old, new in zip(self.seen, ids, strict=True) if old != new}
        match = torch.zeros_like(mass)
        for place, token in enumerate(prompt):
            match[place] = (token in filled) / prompt.count(token)
        if self.reuse.choice == "both":
            return mass / mass.sum() + match / max(match.sum(), 1e-9)
        return match if self.reuse.choice == "match" else mass

    def _listed(self, index: int, scores: Tensor, dense: Tensor) -> Tensor:
        """scores [num_heads, L, L], -inf for the keys that a row does not attend to."""
        if not self.masks:
            return scores
        assert self.sparsity is not None
        seen = over_places(self.masks[index], self.sparsity.sizes, scores.shape[-1]).clone()
        seen[:, dense] = True
        return scores.masked_fill(~seen, -math.inf)


def reusing_llada_generate(
    net: Network,
    prompt: Sequence[int],
    *,
    reuse: Reuse,
    sparsity: Sparsity | None = None,
    gen_length: int,
    **options,
) -> ReusingRun:
    """llada_generate() with reuse; with sparsity the first step records, and those of a refresh."""
    outline = outline_of(prompt, gen_length, shift=0, **options)
    logits_fn = ReusingNetwork(net, reuse, outline, sparsity)
    run = llada_generate(logits_fn, prompt, gen_length=gen_length, **options)
    return with_choices(run, logits_fn)


def reusing_dream_generate(
    net: Network,
    prompt: Sequence[int],
    *,
    reuse: Reuse,
    sparsity: Sparsity | None = None,
    max_new_tokens: int,
    **options,
) -> ReusingRun:
    """dream_generate() with reuse; with sparsity the first step records, and those of a refresh."""
    outline = outline_of(prompt, max_new_tokens, shift=1, **options)
    logits_fn = ReusingNetwork(net, reuse, outline, sparsity)
    run = dream_generate(logits_fn, prompt, max_new_tokens=max_new_tokens, **options)
    return with_choices(run, logits_fn)


def outline_of(
    prompt: Sequence[int],
    num_tokens: int,
    *,
    shift: int,
    steps: int,
    mask_id: int,
    block_length: int | None = None,
    threshold: float | None = None,
    **_,
) -> Outline:
    """With a threshold a step may fill a single place, so that a block has a step for each."""
    block_length = block_length or num_tokens
    blocks = [
        (start, block_steps if threshold is None else end - start)
        for start, end, block_steps in plan_blocks(len(prompt), num_tokens, block_length, steps)
    ]
    length = len(prompt) + num_tokens
    return Outline(len(prompt), length, block_length, blocks, mask_id, shift)


def with_choices(run: Run, logits_fn: ReusingNetwork) -> ReusingRun:
    closest = min(run.closest, logits_fn.closest)
    return ReusingRun(**{**asdict(run), "closest": closest}, chosen=logits_fn.chosen)
