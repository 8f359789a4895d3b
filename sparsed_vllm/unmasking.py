# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Logits -> a token and a confidence for every masked place -> the places a step fills.

One request at a time, so that a request's tokens cannot depend on its batch mates.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat

import torch
from torch import Tensor

from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.phases import Block, even_share

_ELEMENTS_AT_ONCE = 1 << 25  # rows x vocabulary worked on together: 256 MiB in float64


@dataclass(frozen=True)
class Forbidden:
    """Tokens that places may not take. They count in the softmax of the logits all the same.

    mask_token_id: taken nowhere
    stop_tokens int64 [n]: not taken by the rows in `early`; None with it
    early bool [rows]: places at which the text may not end yet; None: there are none
    """

    mask_token_id: int
    stop_tokens: Tensor | None = None
    early: Tensor | None = None

    def of_rows(self, num_rows: int) -> Iterator["Forbidden"]:
        """The same for each `num_rows` rows, in order; without end if no row is early."""
        if self.early is None:
            return repeat(self)
        return (replace(self, early=early) for early in self.early.split(num_rows))

    def bar_from(self, scores: Tensor) -> Tensor:
        """Put these tokens out of reach in `scores` [rows, vocab], which it writes and returns."""
        scores[:, self.mask_token_id] = float("-inf")
        if self.early is not None:
            barred = scores[:, self.stop_tokens].masked_fill(self.early[:, None], float("-inf"))
            scores[:, self.stop_tokens] = barred
        return scores


def choose_tokens(
    logits: Tensor, params: DenoisingParams, forbidden: Forbidden, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The token each row would be filled with, and how sure that is.

    logits [rows, vocab], any float type, only read;  forbidden: tokens that are not chosen
    generator: on the device of `logits`; read only where `params` asks for randomness
    Returns tokens int64 [rows] and confidence float32 [rows], higher is surer.
    """
    choose = _choose_llada if params.policy in ("low_confidence", "random") else _choose_dream
    num_rows = rows_at_once(logits.shape[-1])
    parts = [
        # A copy in any case: what is chosen from is written over.
        choose(part.to(torch.float32, copy=True), params, barred, generator)
        for part, barred in zip(logits.split(num_rows), forbidden.of_rows(num_rows), strict=False)
    ]
    tokens, confidences = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(confidences)


def rows_at_once(vocab_size: int) -> int:
    """Rows of logits that `choose_tokens` works on together; bounds its memory."""
    return max(1, _ELEMENTS_AT_ONCE // vocab_size)


def _choose_llada(
    logits: Tensor, params: DenoisingParams, forbidden: Forbidden, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Gumbel-max tokens; confidence is their probability without noise, or random.

    Source: generate in ML-GSAI/LLaDA generate.py.
    """
    scores = _gumbel(logits, params.temperature, generator)
    if params.policy == "random":
        tokens = forbidden.bar_from(scores).argmax(-1)
        return tokens, _uniform(tokens, generator).float()
    probs = logits.softmax(-1)  # before the scores, which may be the logits, are written
    tokens = forbidden.bar_from(scores).argmax(-1)
    return tokens, _pick(probs, tokens)


def _choose_dream(
    logits: Tensor, params: DenoisingParams, forbidden: Forbidden, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens from the tempered, truncated softmax; confidence as `alg` has it.

    Source: sample_tokens in DreamLM/Dream generation_utils.py.
    """
    if params.temperature > 0:
        logits = forbidden.bar_from(logits) / params.temperature
        logits = _keep_top_k(_keep_top_p(logits, params.top_p), params.top_k)
        tokens = _gumbel(logits, 1.0, generator).argmax(-1)
        probs = logits.softmax(-1)
    else:
        probs = logits.softmax(-1)
        tokens = forbidden.bar_from(logits).argmax(-1)
    if params.policy == "topk_margin":
        best, second = probs.topk(2, dim=-1).values.unbind(-1)
        return tokens, best - second
    if params.policy == "entropy":
        return tokens, (probs * (probs + 1e-10).log()).sum(-1)
    return tokens, _pick(probs, tokens)


def _pick(probs: Tensor, tokens: Tensor) -> Tensor:
    """probs [rows, vocab], tokens [rows] -> [rows]"""
    return probs.gather(-1, tokens[:, None]).squeeze(-1)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Float64 in [0, 1) of the shape of `like`: in fewer bits Gumbel noise distorts the draw
    (arXiv 2409.02908)."""
    return torch.rand(like.shape, dtype=torch.float64, device=like.device, generator=generator)


def _gumbel(scores: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Scores whose argmax is a draw from softmax(scores / temperature)."""
    if temperature == 0:
        return scores
    return scores.double() - temperature * (-_uniform(scores, generator).log()).log()


def _keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Without the tokens after the first whose cumulative probability exceeds top_p."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    drop = probs.cumsum(-1) - probs > top_p
    return logits.masked_fill(drop.scatter(-1, order, drop), float("-inf"))


def _keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    least = logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def choose_places(
    confidence: Tensor, count: int, params: DenoisingParams, generator: torch.Generator
) -> Tensor:
    """Which of the open places a step fills: the `count` surest, or as Dream draws them.

    confidence [places], -inf where a place is not open.  Returns bool [places].
    """
    if params.threshold is not None:
        return _over_threshold(confidence, params.threshold)
    if params.alg_temp > 0:
        confidence = _gumbel(confidence / params.alg_temp, 1.0, generator)
    chosen = torch.zeros_like(confidence, dtype=torch.bool)
    return chosen.scatter(0, confidence.topk(count).indices, True)


def _over_threshold(confidence: Tensor, threshold: float) -> Tensor:
    """Every place at least `threshold` sure, and the surest one.

    Source: get_transfer_index in NVlabs/Fast-dLLM llada/generate.py.
    """
    surest = confidence.argmax()
    return ((confidence >= threshold) | _is(surest, confidence)) & confidence.isfinite()


def _is(index: Tensor, like: Tensor) -> Tensor:
    return torch.arange(like.shape[0], device=like.device) == index


def draw_places(open_places: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Each open place with probability `share`: Dream's `origin`.

    open_places bool [places].  Returns bool [places].
    """
    return (_uniform(open_places, generator) < share) & open_places


# Few, as clients choose both, and the shares of 100,000 steps take 3 MiB.
@lru_cache(maxsize=32)
def dream_shares(steps: int, eps: float) -> tuple[float, ...]:
    """[steps] the share of the masked places that each step fills, 1 - s / t in float32.

    Source: _sample in DreamLM/Dream generation_utils.py; the last step fills what is left.
    """
    timesteps = torch.linspace(1, eps, steps + 1)
    shares: list[float] = (1 - timesteps[1:] / timesteps[:-1]).tolist()
    return (*shares[:-1], 1.0)


def places_per_step(block: Block, params: DenoisingParams) -> list[int]:
    """[block.steps] how many places each step of `block` fills, where that is known beforehand.

    The rule of the family that `params.policy` belongs to; not for `origin` or a threshold.
    """
    if params.policy in ("low_confidence", "random"):
        return [even_share(block.size, block.steps, step) for step in range(block.steps)]
    left, counts = block.size, []
    for share in dream_shares(block.steps, params.eps):
        counts.append(int(torch.tensor(float(left)) * torch.tensor(share)))
        left -= counts[-1]
    return counts
