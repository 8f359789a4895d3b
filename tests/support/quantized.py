# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A checkpoint's int8 twin, as llm-compressor's W8A8 scheme writes it."""

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}


def quantize_int8(source: Path, folder: Path, *, kept: Collection[str]) -> Path:
    """Copy a LLaDA checkpoint of one file, its linears in int8, a scale for each output channel.

    kept: linears that keep their weights as they are, by the checkpoint's names
    """
    shutil.copytree(source, folder)
    weights = dict(_quantized(load_file(source / "model.safetensors"), kept))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _w8a8(kept)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _quantized(weights: dict[str, Tensor], kept: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if ".blocks." not in module or module.endswith("_norm") or module in kept:
            yield name, weight
            continue
        scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
        yield name, (weight.float() / scale).round().char()
        yield f"{module}.weight_scale", scale


def _w8a8(kept: Collection[str]) -> dict[str, Any]:
    """Weights by channel; activations by token, when they come."""
    group = {
        "targets": ["Linear"],
        "weights": {**INT8, "strategy": "channel", "dynamic": False},
        "input_activations": {**INT8, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["model.transformer.ff_out", *kept],
    }
