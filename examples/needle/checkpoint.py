# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The network as a checkpoint in the layout in which LLaDA's authors publish theirs."""

import json
import os
from pathlib import Path
from typing import Any

import checkpoints
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from needle.network import Network, Shape
from needle.vocabulary import BOS, EOS, ID, MASK, UNKNOWN, tokenizer

WEIGHTS = "model.safetensors"
MANTISSA = 7  # bits of a bfloat16's
SHIPPED = Path(__file__).parent / "model"  # comes with the repository, for texts to 4k tokens
LONG = Path(__file__).parent / "long_model"  # this too, for texts to 33k


def save(network: Network, folder: Path, mantissa: int = MANTISSA) -> None:
    """bfloat16 weights, config and tokenizer.

    mantissa: bits of it that a weight keeps
    A file takes its place whole: whoever interrupts finds the last one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = network.state_dict()
    kept = {name: rounded(weight.cpu(), mantissa) for name, weight in weights.items()}
    save_file(kept, folder / f"{WEIGHTS}.part", metadata={"format": "pt"})
    os.replace(folder / f"{WEIGHTS}.part", folder / WEIGHTS)
    checkpoints.write_json(folder / "config.json", config(network.shape))
    checkpoints.write_json(folder / "generation_config.json", {"eos_token_id": ID[EOS]})
    named = {"unk_token": UNKNOWN, "mask_token": MASK}
    checkpoints.save_tokenizer(folder, tokenizer(), BOS, checkpoints.LLADA_CHAT, **named)


def rounded(weight: Tensor, mantissa: int) -> Tensor:
    """The nearest bfloat16 numbers with so many bits behind the leading one, contiguous."""
    fraction, exponent = torch.frexp(weight.float())
    step = 2.0 ** -(mantissa + 1)  # a fraction is in [0.5, 1)
    return torch.ldexp((fraction / step).round() * step, exponent).bfloat16().contiguous()


def shape_of(folder: Path) -> Shape:
    """The sizes of the network of a folder that save() wrote."""
    keys = json.loads((folder / "config.json").read_text())
    return Shape(**{name: keys[name] for name in Shape.__dataclass_fields__})


def load(folder: Path, shape: Shape | None = None) -> Network:
    """The network of a folder that save() wrote, in float32 on the CPU.

    shape: another reach or rotary base, on which no weight depends
    """
    network = Network(shape or shape_of(folder))
    weights = load_file(folder / WEIGHTS)
    network.load_state_dict({name: weight.to(torch.float32) for name, weight in weights.items()})
    return network


def config(shape: Shape) -> dict[str, Any]:
    """LLaDA's config.json."""
    sizes = checkpoints.Shape(
        vocab_size=shape.vocab_size,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_heads,
        d_model=shape.d_model,
        mlp_hidden_size=shape.mlp_hidden_size,
        max_length=shape.max_sequence_length,
    )
    own = {
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_norm_eps,
        "mask_token_id": ID[MASK],
        "eos_token_id": ID[EOS],
        "pad_token_id": ID[EOS],
    }
    return checkpoints.llada_config(sizes, tie=False) | own
