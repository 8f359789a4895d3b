# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Logits -> a token and a confidence for every masked place -> the places a step fills.

One request at a time, so that a request's tokens cannot depend on its batch mates.
"""

from functools import lru_cache

import torch
from torch import Tensor

from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.choice import Choice, Confidence, Forbidden
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.phases import Block, even_share

_CONFIDENCES: dict[str, Confidence] = {"topk_margin": "margin", "entropy": "entropy"}
"""Of the policies for which it is not the chosen token's probability."""


def choose_tokens(
    logits: Tensor, params: DenoisingParams, forbidden: Forbidden, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The token each row would be filled with, and how sure that is.

    logits [rows, vocab], only read;  forbidden: tokens that are not chosen
    generator: on the device of `logits`; its seed is that of the draws
    Returns tokens int64 [rows], confidence float32 [rows], higher is surer, and the largest logit
    of each row, which is a number unless one of the row is none, or infinite.
    """
    choice = _choice_of(params, generator.initial_seed())
    tokens, confidence, largest = api.choose_tokens(logits, choice, forbidden)
    if params.policy == "random":
        confidence = _uniform(tokens, generator).float()
    return tokens, confidence, largest


def _choice_of(params: DenoisingParams, seed: int) -> Choice:
    """LLaDA asks how likely a token is by the logits as they are, Dream by what it draws from.

    Sources: generate in ML-GSAI/LLaDA generate.py; sample_tokens in DreamLM/Dream
    generation_utils.py, which at temperature 0 cuts nothing off. Its 1e-10 in the logarithm of an
    entropy, which adds vocab * 1e-10 at most, is left out.
    """
    if params.policy in ("low_confidence", "random") or params.temperature == 0:
        tempered, top_p, top_k = False, 1.0, 0
    else:
        tempered, top_p, top_k = True, params.top_p, params.top_k
    confidence = _CONFIDENCES.get(params.policy, "probability")
    return Choice(params.temperature, seed, tempered, top_p, top_k, confidence)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Float64 in [0, 1) of the shape of `like`: in fewer bits Gumbel noise distorts the draw
    (arXiv 2409.02908)."""
    return torch.rand(like.shape, dtype=torch.float64, device=like.device, generator=generator)


def _gumbel(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Scores whose argmax is a draw from softmax(scores)."""
    return scores.double() - (-_uniform(scores, generator).log()).log()


def choose_places(
    confidence: Tensor, count: int, params: DenoisingParams, generator: torch.Generator
) -> Tensor:
    """Which of the open places a step fills: the `count` surest, or as Dream draws them.

    confidence [places], -inf where a place is not open.  Returns bool [places].
    """
    if params.threshold is not None:
        return _over_threshold(confidence, params.threshold)
    if params.alg_temp > 0:
        confidence = _gumbel(confidence / params.alg_temp, generator)
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
