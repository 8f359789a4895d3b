# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Which policy chooses tokens, how sure it is of them, and which places a step fills."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsed_vllm.kernels.choice import Choice, Confidence
from sparsed_vllm.params import DenoisingParams

if TYPE_CHECKING:
    from sparsed_vllm.canvases import CanvasStep

_CONFIDENCES: dict[str, Confidence] = {"topk_margin": "margin", "entropy": "entropy"}
"""Of the policies for which it is not the chosen token's probability."""


def choice_of(params: DenoisingParams) -> Choice:
    """How a request's tokens are chosen, and what is called confidence.

    LLaDA asks how likely a token is by the logits as they are, Dream by what it draws from.
    Sources: generate in ML-GSAI/LLaDA generate.py; sample_tokens in DreamLM/Dream
    generation_utils.py, which at temperature 0 cuts nothing off. Its 1e-10 in the logarithm of an
    entropy, which adds vocab * 1e-10 at most, is left out.
    """
    if params.policy in ("low_confidence", "random") or params.temperature == 0:
        tempered, top_p, top_k = False, 1.0, 0
    else:
        tempered, top_p, top_k = True, params.top_p, params.top_k
    confidence = _CONFIDENCES.get(params.policy, "probability")
    return Choice(params.temperature, tempered, top_p, top_k, confidence)


def draws_places(params: DenoisingParams) -> bool:
    """Whether chance has a part in which places are filled."""
    return params.policy in ("random", "origin") or params.alg_temp > 0


def choose_places(step: CanvasStep, confidence: Tensor, uniform: Tensor | None) -> Tensor:
    """Which rows of a step are filled: each request's surest, and those that its policy adds.

    A request fills its `num_filled` surest places (with a threshold: one), where chance may stand
    in for confidence (LLaDA's `random`); every place at least `threshold` sure (get_transfer_index
    in NVlabs/Fast-dLLM llada/generate.py); and each place with probability `share` (Dream's
    `origin`).

    confidence float [num_rows];  uniform float64 [num_rows]: None: there is nothing to draw
    Returns bool [num_rows].
    """
    is_open = step.places >= 0
    scores = confidence.double()
    if uniform is not None:
        scores = torch.where(step["by_chance"][step.reqs] > 0, uniform, scores)
        scores = _with_gumbel(scores, step["alg_temp"][step.reqs], uniform)
    ranks = _ranks(step, scores.masked_fill(~is_open, float("-inf")))
    chosen = ranks < step["num_filled"][step.reqs]
    chosen |= confidence >= step["threshold"].float()[step.reqs]
    if uniform is not None:
        chosen |= uniform < step["share"][step.reqs]
    return chosen & is_open


def _ranks(step: CanvasStep, scores: Tensor) -> Tensor:
    """Each row's rank among its request's, the highest score first; int64 [num_rows]."""
    rows = torch.arange(len(scores), device=scores.device)
    columns = rows - step.count("row_start")[step.reqs]
    table = scores.new_full((len(step.slots), step.most("num_open")), float("-inf"))
    table[step.reqs, columns] = scores
    order = table.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)[step.reqs, columns]


def _with_gumbel(confidence: Tensor, alg_temp: Tensor, uniform: Tensor) -> Tensor:
    """Where alg_temp is over 0: scores whose largest are drawn from softmax(confidence / alg_temp).

    All float64 [num_rows]. In fewer bits Gumbel noise distorts the draw (arXiv 2409.02908).
    Source: _sample in DreamLM/Dream generation_utils.py.
    """
    gumbel = -(-uniform.log()).log()
    return torch.where(alg_temp > 0, confidence / alg_temp.clamp(min=1e-300) + gumbel, confidence)
