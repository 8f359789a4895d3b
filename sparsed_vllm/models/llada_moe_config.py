# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""config.json of inclusionAI/LLaDA-MoE-7B-A1B-*: every key of configuration_lladamoe.py."""

from collections.abc import Iterator

from sparsed_vllm.models.configuration import Computed, DenoisingConfig


class LLaDAMoEConfig(DenoisingConfig):
    """Qwen2's names for the sizes, and the experts'."""

    model_type = "llada"  # as LLaDA: architectures tell the two apart
    attribute_map = {"intermediate_size": "expert_intermediate_size"}  # noqa: RUF012
    honoured = {  # noqa: RUF012 (transformers declares such mappings so)
        "vocab_size": 157184,
        "hidden_size": 2048,
        "expert_intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_layer_freq": None,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "partial_rotary_factor": 1.0,
        "qk_layernorm": True,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "eos_token_id": 156892,
        "pad_token_id": 156892,
    }
    computed = {  # noqa: RUF012
        "hidden_act": Computed("silu", ("silu",), "experts are silu(gate) * up"),
        "clip_qkv": Computed(None, (None,), "queries, keys and values are not clipped"),
        "shared_expert_intermediate_size": Computed(
            None, (None, 0), "all experts are chosen by the router"
        ),
        "moe_router_score_function": Computed("softmax", ("softmax",), "no other is computed"),
        "moe_router_enable_expert_bias": Computed(False, (False,), "the router has no bias"),
        "router_num_group": Computed(None, (None, 1), "experts are chosen one by one"),
        "router_topk_group": Computed(None, (None, 1), "experts are chosen one by one"),
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

    def refusals(self) -> Iterator[str]:
        yield from super().refusals()
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            yield (
                f"num_experts_per_tok must be an integer in [1, {self.num_experts}] (num_experts), "
                f"got {self.num_experts_per_tok}"
            )
        if any(frequency != 1 for frequency in self.moe_layer_freq or ()):
            yield (
                f"moe_layer_freq must be 1 throughout, got {self.moe_layer_freq}: every layer has "
                "experts"
            )
