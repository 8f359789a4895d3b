# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A feed-forward of experts, of which each token takes a few."""

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase


class Experts(nn.Module):
    """vLLM's fused experts behind a router: the softmax over all of them weighs those taken.

    The weights of those taken are not normalized again, as in LLaDA-MoE's code.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.num_experts, self.input_size = config.experts, config.hidden_size
        self.inner_size = config.intermediate_size
        self.gate = GateLinear(config.hidden_size, config.experts, prefix=f"{prefix}.gate")
        self.experts = FusedMoEFactory(
            num_experts=config.experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
        )

    @property
    def method(self) -> QuantizeMethodBase:
        """How vLLM's layer of experts computes, which it calls its quant_method."""
        method: QuantizeMethodBase = self.experts.routed_experts.quant_method
        return method

    @property
    def are_quantized(self) -> bool:
        return not isinstance(self.method, UnquantizedFusedMoEMethod)

    @property
    def are_stored_quantized(self) -> bool:
        """Whether the checkpoint holds them so; vLLM may also quantize them as they load."""
        return self.are_quantized and not self.method.uses_meta_device

    def tensor_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the experts' tensors in a checkpoint; prefix: this module's name."""
        inner, outer = self.inner_size, self.input_size
        return {
            f"{prefix}.experts.{expert}.{name}.weight": shape
            for expert in range(self.num_experts)
            for name, shape in (
                ("gate_proj", (inner, outer)),
                ("up_proj", (inner, outer)),
                ("down_proj", (outer, inner)),
            )
        }

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[tokens, hidden_size] -> [tokens, hidden_size]"""
        router_logits, _ = self.gate(hidden_states)
        output: Tensor = self.experts(hidden_states=hidden_states, router_logits=router_logits)
        return output
