# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The keys of config.json that every model has, checked before vLLM and transformers use them."""

from typing import Any

import torch

_QUANTIZATIONS = ("quantization_config", "compression_config")


def check_format(config_dict: dict[str, Any]) -> None:
    """Raise ValueError for keys of another form than vLLM and transformers take for granted.

    Also for two different types of the weights, and for a quantization without a method.
    """
    _check_architectures(config_dict.get("architectures"))
    _check_remote_code(config_dict)
    given = {
        key: value
        for key in ("dtype", "torch_dtype")
        if (value := config_dict.get(key)) is not None
    }
    for key, value in given.items():
        if not _is_dtype(value):
            raise ValueError(
                f"{key} must be the name of a torch.dtype, such as bfloat16, got {value!r}."
            )
    if len({_name_of(value) for value in given.values()}) > 1:
        both = " and ".join(f"{key}: {value!r}" for key, value in given.items())
        raise ValueError(f"config.json says {both}, which are two names of one thing. Remove one.")
    for key in _QUANTIZATIONS:
        _check_quantization(key, config_dict.get(key))


def _check_architectures(given: Any) -> None:
    is_list = isinstance(given, list | tuple) and all(isinstance(name, str) for name in given)
    if given is not None and not is_list:
        raise ValueError(f"architectures must be a list of names, got {given!r}.")


def _check_remote_code(config_dict: dict[str, Any]) -> None:
    """transformers looks into it, though no remote code runs."""
    if not isinstance(given := config_dict.get("auto_map", {}), dict):
        raise ValueError(f"auto_map must be a mapping or absent, got {given!r}. Remove it.")


def _is_dtype(value: Any) -> bool:
    named = getattr(torch, value, None) if isinstance(value, str) else value
    return isinstance(named, torch.dtype)


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _check_quantization(key: str, given: Any) -> None:
    """Without a method, which vLLM notes as an empty one, it takes the weights for plain ones."""
    is_named = isinstance(given, dict) and (given.get("quant_method") or given.get("producer"))
    if given not in (None, {}, {"quant_method": ""}) and not is_named:
        raise ValueError(f"{key} must be a mapping with a quant_method, got {given!r}.")
