# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Engines for tests."""

from pathlib import Path
from typing import Any

from vllm import LLM

KV_CACHE_BYTES = 1 << 26

_ENGINES: list[LLM] = []  # one that ends takes along the process groups of all in its process


def start_engine(path: str | Path, **kwargs: Any) -> LLM:
    """An engine in this process, small and exact; it lives as long as the process."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
    }
    _ENGINES.append(LLM(str(path), **{**defaults, **kwargs}))
    return _ENGINES[-1]
