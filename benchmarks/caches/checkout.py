# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Modules of a checkout, and LLaDA-8B with random weights as its classes build it.

All that LLaDA's modules take from transformers are base classes and registries, and from einops a
function that these loops do not call. Stand-ins take their place while the modules load, so that
any version of either will do, or none.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

LLADA = {  # LLaDA-8B's config.json, as far as a network is built by it
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_theta": 500000.0,
    "weight_tying": False,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
}


class Config:
    """For transformers.PretrainedConfig: what it is given."""

    use_return_dict = True

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


class Model(nn.Module):
    """For transformers.PreTrainedModel."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class Registry:
    """For transformers.AutoModel and its like."""

    @staticmethod
    def register(*names: Any) -> None:
        """Nothing is looked up by name."""


STAND_INS = {
    "einops": SimpleNamespace(rearrange=None),
    "transformers": SimpleNamespace(
        AutoConfig=Registry,
        AutoModel=Registry,
        AutoTokenizer=Registry,
        PretrainedConfig=Config,
        PreTrainedModel=Model,
    ),
    "transformers.cache_utils": SimpleNamespace(Cache=object),
    "transformers.modeling_outputs": SimpleNamespace(CausalLMOutputWithPast=SimpleNamespace),
    "transformers.models": SimpleNamespace(),
    "transformers.models.auto": SimpleNamespace(AutoModel=Registry),
}


def load(folder: Path, *names: str) -> list[ModuleType]:
    """Modules by name, `folder` before all else on the path."""
    with stand_ins():
        sys.path.insert(0, str(folder))
        try:
            return [importlib.import_module(name) for name in names]
        finally:
            sys.path.remove(str(folder))


@contextmanager
def stand_ins() -> Iterator[None]:
    kept = {name: sys.modules.get(name) for name in STAND_INS}
    sys.modules.update(STAND_INS)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@torch.no_grad()
def build(modeling: ModuleType, device: str, **fields: Any) -> Model:
    """Random weights, in bfloat16.

    modeling: its LLaDAConfig, LLaDAModel, LLaDAModelLM and ModelConfig;  fields: not LLaDA-8B's
    """
    config = modeling.LLaDAConfig(**{**LLADA, **fields, "init_device": device})
    sizes = modeling.create_model_config_from_pretrained_config(config)
    torch.set_default_dtype(torch.bfloat16)
    network = modeling.LLaDAModel(sizes, init_params=False)
    torch.set_default_dtype(torch.float32)
    # Never the likeliest token: a place that is filled with the mask would be filled again.
    network.transformer.ff_out.weight[config.mask_token_id] = 0
    return modeling.LLaDAModelLM(config, model=network).eval().requires_grad_(False)
