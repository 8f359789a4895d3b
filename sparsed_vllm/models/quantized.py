# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What a checkpoint holds for quantized layers: packed weights, scales, zero points."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from vllm.model_executor.models.utils import WeightsMapper

from sparsed_vllm.models.experts import Experts

_OPTIONAL = ("g_idx", "g_idx_sort_indices", "weight_shape")
"""Parameters that a file may leave out: vLLM fills them in, or computes nothing with them."""

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class QuantizedTensors:
    """The tensors that layers take which a checkpoint holds quantized, by its layers.

    expected: the model's name of a checkpoint's layer (q_proj, not qkv_proj) and of a parameter of
        it, with that parameter
    seen: those of them that the checkpoint brought
    """

    def __init__(
        self, model: nn.Module, mapper: WeightsMapper, parts: Mapping[str, list[str]]
    ) -> None:
        """parts: name of such a linear layer or head -> the checkpoint's layers that it is"""
        modules = dict(model.named_modules())
        self.parameters = {name for name, _ in model.named_parameters()}
        self.parameters |= {name for name, _ in model.named_buffers()}
        self.expected = {
            f"{part}.{own}": parameter
            for name, layers in parts.items()
            for own, parameter in _loadable(modules[name])
            if own != "bias"
            for part in layers
        }
        for name, module in modules.items():
            if isinstance(module, Experts) and module.are_stored_quantized:
                self.expected |= _of_experts(name, module)
        self.seen: set[str] = set()
        config = getattr(model, "quant_config", None)
        self.is_none, self.mapper = config is None, mapper
        self.ignored: tuple[str, ...] = ()
        if config is not None:
            self.mapper |= config.get_cache_scale_mapper()
            self.mapper |= config.get_checkpoint_weight_mapper()
            self.ignored = tuple(config._ignore_unexpected_suffixes)

    def takes(self, file_name: str, name: str) -> bool:
        """Whether a layer takes a tensor, which is noted.

        file_name: the checkpoint's;  name: the model's, without its stacking
        """
        if self.is_none:
            return False
        mapped = self.mapper.map_name(file_name)
        if mapped is None:
            return True
        key = _key(name, mapped)
        if key in self.expected:
            self.seen.add(key)
            return True
        return mapped in self.parameters or file_name.endswith(self.ignored or "\0")

    def misfit(self, file_name: str, name: str, tensor: Tensor) -> str | None:
        """What is wrong with a tensor that a layer takes: numbers that were never quantized."""
        parameter = self.expected.get(_key(name, self.mapper.map_name(file_name) or name))
        if parameter is None or parameter.dtype in _PLAIN or tensor.dtype not in _PLAIN:
            return None
        return f"{tensor.dtype} instead of {parameter.dtype}"

    @property
    def missing(self) -> list[str]:
        return [key for key in self.expected.keys() - self.seen if not key.endswith(_OPTIONAL)]


def _key(name: str, mapped: str) -> str:
    """The layer of `name` with the parameter of `mapped`, which quantization may rename."""
    return f"{name.rpartition('.')[0]}.{mapped.rpartition('.')[2]}"


def _loadable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters that files hold; vLLM makes others as constants."""
    for name, parameter in module.named_parameters(recurse=False):
        if hasattr(parameter, "weight_loader"):
            yield name, parameter


def _of_experts(prefix: str, experts: Experts) -> dict[str, nn.Parameter]:
    """vLLM keeps the first two projections of all experts as w13, the last as w2."""
    projections = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
    return {
        f"{prefix}.experts.{expert}.{part}.{own}": parameter
        for name, parameter in _loadable(experts.experts.routed_experts)
        for stack, _, own in [name.partition("_")]
        for part in projections.get(stack, ())
        for expert in range(experts.num_experts)
    }
