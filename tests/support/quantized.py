# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A checkpoint's quantized twins, as llm-compressor's schemes W8A8 and W4A16 write them."""

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True}

Parts = dict[str, Tensor]
"""What stands for one linear's weight, by the names that its module gives them."""


def quantize_int8(source: Path, folder: Path, *, kept: Collection[str] = ()) -> Path:
    """Copy a LLaDA checkpoint of one file, its linears in int8, a scale for each output channel.

    Activations are for the engine to quantize, token by token.
    kept: linears that keep their weights as they are, by the checkpoint's names
    """
    group = {
        "weights": {**INT8, "strategy": "channel", "dynamic": False},
        "input_activations": {**INT8, "strategy": "token", "dynamic": True},
    }
    return _write(source, folder, _by_channel, kept, format="int-quantized", group=group)


def quantize_int4(
    source: Path, folder: Path, *, group_size: int, kept: Collection[str] = ()
) -> Path:
    """Copy a LLaDA checkpoint of one file, its linears in int4, for weights alone.

    group_size: inputs of an output channel that share a scale;  kept: as in quantize_int8
    """
    weights = {**INT4, "strategy": "group", "group_size": group_size, "dynamic": False}
    group = {"weights": weights, "input_activations": None}
    in_groups = partial(_in_groups, group_size=group_size)
    return _write(source, folder, in_groups, kept, format="pack-quantized", group=group)


def _write(
    source: Path,
    folder: Path,
    quantize: Callable[[Tensor], Parts],
    kept: Collection[str],
    *,
    format: str,
    group: dict[str, Any],
) -> Path:
    shutil.copytree(source, folder)
    weights = dict(_quantized(load_file(source / "model.safetensors"), quantize, kept))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "ignore": ["model.transformer.ff_out", *kept],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _quantized(
    weights: Parts, quantize: Callable[[Tensor], Parts], kept: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if ".blocks." not in module or module.endswith("_norm") or module in kept:
            yield name, weight
            continue
        for part, tensor in quantize(weight.float()).items():
            yield f"{module}.{part}", tensor


def _by_channel(weight: Tensor) -> Parts:
    """weight [outputs, inputs].  Gives int8 of that shape, scale float32 [outputs, 1]."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {"weight": (weight / scale).round().char(), "weight_scale": scale}


def _in_groups(weight: Tensor, group_size: int) -> Parts:
    """weight [outputs, inputs].

    Gives int32 [outputs, inputs / 8], scale bfloat16 [outputs, inputs / group_size] and the shape.
    """
    groups = weight.unflatten(1, (-1, group_size))
    scale = groups.abs().amax(dim=2) / 7
    levels = (groups / scale[:, :, None]).round().flatten(1)
    return {
        "weight_packed": _pack(levels),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }


def _pack(levels: Tensor) -> Tensor:
    """levels [outputs, inputs] from -8 to 7.  Gives int32 [outputs, inputs / 8].

    Eight in a word, the first in its lowest bits, each counted from -8.
    """
    nibbles = (levels + 8).byte()
    low, high = nibbles[:, 0::2], nibbles[:, 1::2]
    return (low | high << 4).view(torch.int32)
