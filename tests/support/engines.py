# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Engines for tests, and what is inside them."""

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import LLM

from sparsed_vllm.model_state import DenoisingModelState
from sparsed_vllm.scheduler import DenoisingScheduler
from sparsed_vllm.tables import rows_of

KV_CACHE_BYTES = 1 << 26

MAY_REUSE = {"reuse": {"by_default": 0, "every": 1, "layers": 1}}
"""An engine whose requests say what they reuse, and whose layers all choose."""

_ENGINES: list[LLM] = []  # one that ends takes along the process groups of all in its process


def start_engine(path: str | Path, **kwargs: Any) -> LLM:
    """An engine in this process, small and exact; it lives as long as the process."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "gpu_memory_utilization": 0.1,  # of a GPU that many engines share
        "async_scheduling": False,  # llm_engine.step() is one step, with its results
    }
    # vLLM collects garbage eight times as it starts: it need not look at all that there is so far.
    gc.freeze()
    _ENGINES.append(LLM(str(path), **{**defaults, **kwargs}))
    return _ENGINES[-1]


def scheduler_of(llm: LLM) -> DenoisingScheduler:
    return llm.llm_engine.engine_core.engine_core.scheduler


def state_of(llm: LLM) -> DenoisingModelState:
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.model_state


def masks_of(llm: LLM, length: int, block_size: int, query_block_size: int | None = None) -> Tensor:
    """The blocks that the table lists of the only request, or of the first in the last step.

    query_block_size: None: block_size
    bool [num_layers, num_heads, query blocks, key blocks], on the CPU, as the oracle has them.
    """
    tile = query_block_size or block_size
    state, rows, blocks = state_of(llm), -(-length // tile), -(-length // block_size)
    masks = []
    for layer in state.vllm_config.compilation_config.static_forward_context.values():
        tables = layer.impl.tables_of(layer.kv_cache, state._pages, tile)
        kept, num_kept = (x.transpose(0, 1).cpu() for x in rows_of(tables, 0, rows))
        counts = torch.arange(kept.shape[-1]) < num_kept[..., None]
        mask = torch.zeros(*kept.shape[:2], blocks + 1, dtype=torch.bool)
        masks.append(mask.scatter_(-1, kept.long().where(counts, blocks), True)[..., :blocks])
    return torch.stack(masks)
