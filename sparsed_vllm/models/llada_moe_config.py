# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""config.json of inclusionAI/LLaDA-MoE-7B-A1B-*: every key of configuration_lladamoe.py."""

from collections.abc import Iterator
from typing import Any

from sparsed_vllm.models.configuration import Computed, DenoisingConfig


class LLaDAMoEConfig(DenoisingConfig):
    """Qwen2's names for the sizes, and the experts'. The checkpoint says all sizes."""

    model_type = "llada"  # as LLaDA: architectures tell the two apart
    attribute_map = {"intermediate_size": "expert_intermediate_size"}  # noqa: RUF012
    honoured = {  # noqa: RUF012 (transformers declares such mappings so)
        "vocab_size": None,
        "hidden_size": None,
        "expert_intermediate_size": None,
        "num_hidden_layers": None,
        "num_attention_heads": None,
        "num_key_value_heads": None,  # as many as of queries
        "num_experts": None,
        "num_experts_per_tok": None,
        "moe_layer_freq": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": None,
        "partial_rotary_factor": 1.0,
        "qk_layernorm": False,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "eos_token_id": 50279,
        "pad_token_id": 1,
    }
    own_sizes = ("num_experts", "num_experts_per_tok")
    computed = {  # noqa: RUF012
        "hidden_act": Computed("silu", ("silu",), "experts are silu(gate) * up"),
        "clip_qkv": Computed(None, (None,), "queries, keys and values are not clipped"),
        "shared_expert_intermediate_size": Computed(
            None, (None, 0), "all experts are chosen by the router"
        ),
        "moe_router_score_function": Computed("softmax", ("softmax", None), "no other is computed"),
        "moe_router_enable_expert_bias": Computed(False, (False, None), "the router has no bias"),
        "router_num_group": Computed(None, (None, 1, -2), "experts are chosen one by one"),
        "router_topk_group": Computed(None, (None, 1, -2), "experts are chosen one by one"),
        "routed_scaling_factor": Computed(1, (None, 1), "experts' outputs are not scaled"),
        "norm_topk_prob": Computed(
            None, (None, False), "the chosen experts' weights are not normalized again"
        ),
    }
    harmless = frozenset(
        {
            "dense_intermediate_size",  # of layers without experts
            "router_aux_loss_coef",
            "output_router_logits",
            "attention_dropout",
            "initializer_range",
            "use_cache",
        }
    )

    def derived(self) -> dict[str, Any]:
        kv_heads = self.num_key_value_heads
        return {
            "num_key_value_heads": self.num_attention_heads if kv_heads is None else kv_heads,
            "qk_layernorm": False if self.qk_layernorm is None else self.qk_layernorm,
        }

    @property
    def qkv_bias(self) -> bool:
        return bool(self.attention_bias)

    @property
    def output_bias(self) -> bool:
        return bool(self.attention_bias)

    @property
    def qk_norm(self) -> bool:
        return bool(self.qk_layernorm)

    @property
    def experts(self) -> int:
        return int(self.num_experts)

    def _wrong_sizes(self) -> Iterator[str]:
        yield from super()._wrong_sizes()
        experts, taken = self.num_experts, self.num_experts_per_tok
        if isinstance(experts, int) and isinstance(taken, int) and taken > experts:
            allowed = f"an integer in [1, {experts}] (num_experts)"
            yield f"num_experts_per_tok must be {allowed}, got {taken}"

    def refusals(self) -> Iterator[str]:
        yield from super().refusals()
        if self.moe_layer_freq not in (None, [], [1] * self.num_hidden_layers):
            yield (
                f"moe_layer_freq must be 1 throughout, for {self.num_hidden_layers} layers, got "
                f"{self.moe_layer_freq!r}: every layer has experts"
            )
