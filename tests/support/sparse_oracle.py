# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What a request that runs SparseD must return: oracle.py's networks and loops, with L x L masks.

Written after the authors' published code (github.com/INV-WZQ/SparseD; arXiv 2509.24014).
What is ours: budgets by mass, which come last in select_blocks(), and recording again. Else the
differences:
  LLaDA's scores are divided by sqrt(head_dim) as in its attention, not by sqrt(num_heads), unless
    published_scale is set;
  scores are float64, and of equal scores the lower block wins;
  a selection of more blocks than there are takes all of them, where theirs raises;
  query blocks may have more tokens than key blocks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from oracle import Layer, Network, Run, dream_generate, llada_generate, rms_norm
from torch import Tensor
from torch.nn.functional import linear, pad


@dataclass(frozen=True)
class Sparsity:
    skip: float = 0.2
    select: float | None = None  # None: 0.3, or with a mass all
    block_size: int = 32
    query_block_size: int | None = None  # rows that share a list; None: block_size
    refresh: int | None = None  # record again every so many steps; None: never
    mass: float | None = None  # of what `select` keeps, that which holds so much; None: all
    total_steps: int | None = None  # T of the paper; None: the steps of the request
    published_scale: bool = False  # divide scores by sqrt(num_heads)

    @property
    def recording_step(self) -> int:
        """The first step that records; at or after total_steps there is none."""
        return int(self.total_steps * self.skip) + 1

    def records_at(self, step: int) -> bool:
        since = step - self.recording_step
        return since == 0 or (self.refresh is not None and since > 0 and since % self.refresh == 0)

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens of a query block and of a key block."""
        return self.query_block_size or self.block_size, self.block_size

    def num_blocks(self, length: int) -> int:
        return math.ceil(length / self.block_size)

    def num_kept(self, num_blocks: int) -> int:
        select = self.select or (0.3 if self.mass is None else 1.0)
        return min(int(num_blocks * select) + 1, num_blocks)

    def first_generation_block(self, length: int, gen_length: int) -> int:
        """The first block of generated places only, or else the last block."""
        return min(self.num_blocks(length - gen_length), self.num_blocks(length) - 1)


@dataclass(frozen=True)
class SparseRun(Run):
    """A Run whose closest decision may also have been one between blocks.

    Blocks lead one another by ln(kept / dropped) of their scores: that is in units of logits and
    rounding moves it as much (float32 against float64 networks: up to 8e-6 at 500 places), so
    that met_a_tie() applies to it as it is.
    """

    masks: Tensor | None = field(default=None, compare=False)  # of SparseNetwork
    leads: Tensor | None = field(default=None, compare=False)  # of SparseNetwork


class SparseNetwork:
    """The LogitsFn of one request: call number s is its step s, over all blocks of the canvas.

    masks: None, after a recording step bool [num_layers, num_heads, query blocks, key blocks],
      which key blocks (last) each query block of each query head keeps
    leads: None, then float64 [num_layers, num_heads, query blocks], by how little a query block's
      closest choice in any of them was taken: ln(kept / dropped) of the scores, inf where nothing
      was dropped
    """

    def __init__(self, net: Network, sparsity: Sparsity, prompt_length: int, gen_length: int):
        assert sparsity.total_steps is not None, "how many steps?"
        self.net, self.sparsity = net, sparsity
        self.length, self.gen_length = prompt_length + gen_length, gen_length
        self.step = 0
        self.masks: Tensor | None = None
        self.leads: Tensor | None = None

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """ids [1, L] -> logits [1, L, vocab], as Network does it."""
        assert ids.shape == (1, self.length), "another request's ids"
        net, recorded = self.net, []
        records = self.sparsity.records_at(self.step)
        if records:
            self.masks = None
        x = net.embedding[ids[0]]
        for index, layer in enumerate(net.layers):
            h = rms_norm(x, layer.attn_norm, net.eps)
            if records:
                q, k, _ = net.heads(layer, h)
                recorded.append(select_blocks(q, k, self.sparsity, self.gen_length))
            x = x + self.attention(index, layer, h)
            x = x + layer.mlp(rms_norm(x, layer.mlp_norm, net.eps))
        if recorded:
            self.masks, leads = map(torch.stack, zip(*recorded, strict=True))
            self.leads = leads if self.leads is None else torch.minimum(self.leads, leads)
        self.step += 1
        return linear(rms_norm(x, net.norm, net.eps), net.head)[None]

    def attention(self, index: int, layer: Layer, x: Tensor) -> Tensor:
        """x [L, hidden] -> [L, hidden], with a mask once there is one."""
        if self.masks is None:
            return self.net.attention(layer, x)
        q, k, v = self.net.heads(layer, x)
        seen = over_places(self.masks[index], self.sparsity.sizes, len(x))
        logits = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
        return linear((logits.softmax(dim=-1) @ v).transpose(0, 1).flatten(1), *layer.o)

    @property
    def closest_scores(self) -> float:
        """The smallest of all leads; inf where nothing was recorded."""
        return math.inf if self.leads is None else float(self.leads.min())


def select_blocks(
    q: Tensor, k: Tensor, sparsity: Sparsity, gen_length: int
) -> tuple[Tensor, Tensor]:
    """Isolated selection of one layer: its masks and leads, as SparseNetwork keeps them.

    q, k [num_heads, L, head_dim], rotated, each key head repeated for its query heads
    """
    size, first_gen = sparsity.block_size, sparsity.first_generation_block(q.shape[1], gen_length)
    if sparsity.published_scale:
        q = q * math.sqrt(q.shape[2] / q.shape[0])
    scores = block_scores(q, k, sparsity.sizes)  # [num_heads, query blocks, num_blocks]
    gen_scores = block_scores(q, k[:, first_gen * size :], sparsity.sizes)  # [.., first_gen on]
    mask = best_blocks(scores, sparsity.num_kept(scores.shape[-1]))
    gen_mask = best_blocks(gen_scores, sparsity.num_kept(gen_scores.shape[-1]))
    leads = torch.minimum(
        closest_leads(scores, mask, first_gen),
        closest_leads(gen_scores, gen_mask, gen_scores.shape[-1]),
    )
    kept = torch.cat((mask[..., :first_gen], gen_mask), dim=-1)
    if sparsity.mass is not None:
        needed, needed_leads = blocks_holding(scores, sparsity.mass)
        gen_needed, gen_leads = blocks_holding(gen_scores, sparsity.mass)
        needed[..., first_gen:] |= gen_needed
        kept &= needed
        leads = torch.stack((leads, needed_leads, gen_leads)).amin(dim=0)
    return kept, leads


def block_scores(q: Tensor, k: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Means of softmax(q k / sqrt(head_dim)) over blocks of so many rows by so many keys.

    q [num_heads, L, head_dim]; k [num_heads, keys, head_dim]
    Returns float64 [num_heads, query blocks, key blocks]. Places past the end count as 0.
    """
    weights = (q.double() @ k.double().mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
    rows, keys = (-n % size for n, size in zip(weights.shape[1:], sizes, strict=True))
    padded = pad(weights, (0, keys, 0, rows))
    return padded.unflatten(2, (-1, sizes[1])).unflatten(1, (-1, sizes[0])).mean(dim=(2, 4))


def best_blocks(scores: Tensor, count: int) -> Tensor:
    """bool [..., blocks], where scores [..., blocks] has its count highest."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def blocks_holding(scores: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The fewest highest of scores [..., blocks] that hold the share of their sum, and leads.

    A lead is also by how little, as ln(held / needed), some number of them holds it or does not.
    """
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    held, enough = ranked.cumsum(dim=-1), share * scores.sum(dim=-1, keepdim=True)
    count = 1 + (held < enough).sum(dim=-1, keepdim=True)
    is_kept = torch.arange(scores.shape[-1]) < count
    mask = torch.zeros_like(is_kept).scatter_(-1, order, is_kept)
    leads = closest_leads(scores, mask, scores.shape[-1])
    return mask, torch.minimum(leads, (held / enough).log().abs().amin(dim=-1))


def closest_leads(scores: Tensor, mask: Tensor, stop: int) -> Tensor:
    """Smallest ln(kept / dropped) of two key blocks of which at least one is before stop.

    scores, mask [num_heads, query blocks, key blocks] -> [num_heads, query blocks]
    """
    if stop == 0:
        return torch.full_like(scores[..., 0], math.inf)
    logs = scores.log()
    kept, dropped = logs.masked_fill(~mask, math.inf), logs.masked_fill(mask, -math.inf)
    return torch.minimum(
        kept[..., :stop].amin(dim=-1) - dropped.amax(dim=-1),
        kept.amin(dim=-1) - dropped[..., :stop].amax(dim=-1),
    )


def over_places(mask: Tensor, sizes: tuple[int, int], length: int) -> Tensor:
    """mask [..., query blocks, key blocks] -> [..., length, length]"""
    for dim, size in zip((-2, -1), sizes, strict=True):
        mask = mask.repeat_interleave(size, dim=dim)
    return mask[..., :length, :length]


def sparse_llada_generate(
    net: Network,
    prompt: Sequence[int],
    *,
    sparsity: Sparsity,
    steps: int,
    gen_length: int,
    **options,
) -> SparseRun:
    """llada_generate() with sparse attention; T is `steps`, also with a threshold."""
    logits_fn = for_request(net, sparsity, steps, len(prompt), gen_length)
    run = llada_generate(logits_fn, prompt, steps=steps, gen_length=gen_length, **options)
    return with_masks(run, logits_fn)


def sparse_dream_generate(
    net: Network,
    prompt: Sequence[int],
    *,
    sparsity: Sparsity,
    steps: int,
    max_new_tokens: int,
    **options,
) -> SparseRun:
    """dream_generate() with sparse attention; T is `steps`, also with a threshold."""
    logits_fn = for_request(net, sparsity, steps, len(prompt), max_new_tokens)
    run = dream_generate(logits_fn, prompt, steps=steps, max_new_tokens=max_new_tokens, **options)
    return with_masks(run, logits_fn)


def for_request(
    net: Network, sparsity: Sparsity, steps: int, prompt_length: int, gen_length: int
) -> SparseNetwork:
    if sparsity.total_steps is None:
        sparsity = replace(sparsity, total_steps=steps)
    return SparseNetwork(net, sparsity, prompt_length, gen_length)


def with_masks(run: Run, logits_fn: SparseNetwork) -> SparseRun:
    closest = min(run.closest, logits_fn.closest_scores)
    return SparseRun(run.ids, run.forwards, closest, run.logprobs, logits_fn.masks, logits_fn.leads)
