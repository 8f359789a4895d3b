# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The kernels of quantized layers: found as they are made, called before requests are taken."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.platforms import current_platform

from sparsed_vllm.models.experts import Experts

_REMEDY = (
    "Use --dtype bfloat16 if it is another, a checkpoint in another scheme (int8 weights and "
    "activations run in bfloat16 on every x86-64 processor), no quantization, or another machine."
)
_REMEDY_OF_EXPERTS = (
    "Use no quantization, or of all but the experts: --quantization online "
    """--quantization-config '{"linear": "fp8_per_channel"}'."""
)


@contextmanager
def finding_kernels(vllm_config: VllmConfig) -> Iterator[None]:
    """Around what makes layers, where vLLM looks for a kernel of their quantization.

    Raises ValueError that names scheme, type, processor and remedy.
    """
    try:
        yield
    except (AssertionError, AttributeError, NotImplementedError, ValueError) as error:
        if vllm_config.quant_config is None:
            raise
        raise no_kernel(vllm_config, error) from error


def check_kernels(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Run one row through a quantized layer of each scheme, size and bias, on a CPU.

    vLLM picks a kernel by types and shapes; whether its operator is in the library that this
    processor loads (AVX2, AVX-512, AMX) shows when it is called. GPUs call all of them while vLLM
    profiles memory, an eager CPU engine calls none before the first request.
    Raises ValueError that names scheme, type, processor and remedy.
    """
    if not current_platform.is_cpu():
        return
    for name, layer in _one_of_each_kind(model):
        scheme = getattr(layer, "scheme", None) or _method(layer)
        row = torch.zeros(1, _input_size(layer), dtype=vllm_config.model_config.dtype)
        try:
            if isinstance(layer, Experts):
                with set_forward_context(None, vllm_config, num_tokens=1):
                    layer(row)
            else:
                layer.quant_method.apply(layer, row, layer.bias)
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            named = f"quantization scheme {type(scheme).__name__} of {name}"
            raise no_kernel(vllm_config, error, named) from error


def no_kernel(vllm_config: VllmConfig, error: Exception, scheme: str = "") -> ValueError:
    """The refusal of a quantization of which vLLM says, by `error`, that it does not run here."""
    scheme = scheme or f"quantization {vllm_config.model_config.quantization}"
    model, machine = vllm_config.model_config, current_platform.get_device_name()
    if current_platform.is_cpu():
        machine = f"this processor ({torch.backends.cpu.get_cpu_capability()})"
    reason = str(error).strip().rstrip(".") or type(error).__name__
    remedy = _REMEDY_OF_EXPERTS if model.hf_config.experts else _REMEDY
    return ValueError(
        f"The {scheme} does not run in {model.dtype} on {machine}: {reason}. {remedy}"
    )


def _one_of_each_kind(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of a quantized layer of each scheme and size, with a bias and without."""
    seen = set()
    for name, layer in model.named_modules():
        if not _is_quantized(layer):
            continue
        scheme = getattr(layer, "scheme", None)
        sizes = (_input_size(layer), getattr(layer, "output_size_per_partition", None))
        has_bias = getattr(layer, "bias", None) is not None
        kind = (type(_method(layer)), type(scheme), has_bias, *sizes)
        if kind not in seen:
            seen.add(kind)
            yield name, layer


def _is_quantized(layer: nn.Module) -> bool:
    if isinstance(layer, Experts):
        return layer.are_quantized
    method = _method(layer)
    return (
        isinstance(layer, LinearBase | ParallelLMHead)
        and isinstance(method, QuantizeMethodBase)
        and not isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod)
    )


def _method(layer: nn.Module) -> Any:
    return layer.method if isinstance(layer, Experts) else getattr(layer, "quant_method", None)


def _input_size(layer: nn.Module) -> int:
    """Width of a row on this rank."""
    for attribute in ("input_size_per_partition", "input_size", "embedding_dim"):
        if size := getattr(layer, attribute, None):
            return int(size)
    raise AssertionError(f"{type(layer).__name__} has no input size")
