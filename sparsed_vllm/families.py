# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The two families of full-attention diffusion language models and how their authors decode."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What sets one family's decoding apart from the other's.

    name: as users know it
    policy_field: the request parameter that names the unmasking policy
    policies: its values, the authors' default first
    threshold_policy: the policy whose confidence `threshold` is compared with
    entropy_policy: the policy that `entropy_threshold` may be named with
    own_fields: request parameters that only this family has
    truncates: whether the authors' sampler knows top_p and top_k
    shifts_logits: whether place i is predicted by the hidden state of place i - 1
    """

    name: str
    policy_field: str
    policies: tuple[str, ...]
    threshold_policy: str
    entropy_policy: str
    own_fields: frozenset[str]
    truncates: bool
    shifts_logits: bool


# LLaDA (arXiv 2502.09992) and LLaDA-1.5; decoding after generate.py of ML-GSAI/LLaDA.
LLADA = Family(
    name="LLaDA",
    policy_field="remasking",
    policies=("low_confidence", "random"),
    threshold_policy="low_confidence",
    entropy_policy="low_confidence",
    own_fields=frozenset({"remasking"}),
    truncates=False,
    shifts_logits=False,
)

# Dream (arXiv 2508.15487) and DiffuCoder; decoding after generation_utils.py of DreamLM/Dream.
DREAM = Family(
    name="Dream",
    policy_field="alg",
    policies=("origin", "maskgit_plus", "topk_margin", "entropy"),
    threshold_policy="maskgit_plus",
    entropy_policy="entropy",
    own_fields=frozenset({"alg", "alg_temp", "eps"}),
    truncates=True,
    shifts_logits=True,
)

FAMILIES = (LLADA, DREAM)
