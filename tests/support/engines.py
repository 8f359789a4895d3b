# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Engines for tests."""

from pathlib import Path
from typing import Any

from vllm import LLM


def start_engine(path: str | Path, **kwargs: Any) -> LLM:
    """An engine in this process, small and exact."""
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8}
    return LLM(str(path), **{**defaults, **kwargs})
