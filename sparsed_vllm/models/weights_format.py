# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What config.json says of its weights' type and quantization, before vLLM and torch read it."""

from typing import Any

import torch


def check_format(config_dict: dict[str, Any]) -> None:
    """Raise ValueError for a type that is none, two of them, or a quantization without a method."""
    given = {key: config_dict[key] for key in ("dtype", "torch_dtype") if config_dict.get(key)}
    for key, value in given.items():
        if not isinstance(getattr(torch, _name_of(value), None), torch.dtype):
            raise ValueError(f"{key} must be the name of a torch.dtype, got {value!r}.")
    if len({_name_of(value) for value in given.values()}) > 1:
        both = " and ".join(f"{key}: {value!r}" for key, value in given.items())
        raise ValueError(f"config.json says {both}, which are two names of one thing. Remove one.")
    _check_quantization(config_dict.get("quantization_config"))


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _check_quantization(given: Any) -> None:
    """Without a method vLLM would take the weights for plain ones."""
    is_named = isinstance(given, dict) and {"quant_method", "producer"} & given.keys()
    if given and not is_named:
        raise ValueError(
            f"quantization_config must be a mapping with a quant_method, got {given!r}."
        )
