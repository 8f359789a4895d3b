# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Which policy chooses tokens, how sure it is of them, and whether chance fills places."""

from sparsed_vllm.kernels.choice import Choice, Confidence
from sparsed_vllm.params import DenoisingParams

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
    policy = "entropy" if params.by_entropy else params.policy
    confidence = _CONFIDENCES.get(policy, "probability")
    return Choice(params.temperature, tempered, top_p, top_k, confidence)


def draws_places(params: DenoisingParams) -> bool:
    """Whether chance has a part in which places are filled."""
    return params.policy in ("random", "origin") or params.alg_temp > 0
