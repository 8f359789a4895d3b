# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The model's matrix products by themselves: what a step would take without all else."""

import statistics
import time
from functools import partial

import torch
from torch import nn
from vllm import LLM
from vllm.model_executor.layers.linear import LinearBase

from generation.machine import wait


def seconds_of_gemms(llm: LLM, tokens: int, rows: int, rounds: int = 3) -> float:
    """The engine's own layers, each once, over a step's tokens; the head over `rows`."""
    (seconds,) = llm.apply_model(partial(time_gemms, tokens=tokens, rows=rows, rounds=rounds))
    return seconds


@torch.inference_mode()
def time_gemms(model: nn.Module, tokens: int, rows: int, rounds: int) -> float:
    layers = [layer for layer in model.modules() if isinstance(layer, LinearBase)]
    sizes = {layer.input_size_per_partition for layer in layers}
    weight = model.lm_head.weight
    like = {"dtype": weight.dtype, "device": weight.device}
    inputs = {size: torch.randn(tokens, size, **like) for size in sizes}
    masked = torch.randn(rows, weight.shape[1], **like)
    times = []
    for _ in range(rounds + 1):
        wait()
        begin = time.perf_counter()
        for layer in layers:
            layer.quant_method.apply(layer, inputs[layer.input_size_per_partition], None)
        model.lm_head.quant_method.apply(model.lm_head, masked, None)
        wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])  # the first one chooses kernels
