# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""FlashAttention, as vLLM has it, for sequences that attend to everything."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.logger import init_logger

from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.layout import (
    KEY_LEN,
    KEY_START,
    NUM_ROWS,
    PAGE_ROW,
    QUERY_START,
    BatchLayout,
)

logger = init_logger("vllm.sparsed.attention")

Rows = slice | Tensor
"""Rows of a tensor: consecutive ones, or int64 [n]."""


@dataclass(frozen=True)
class PackedSequences:
    """Sequences of a layout as FlashAttention takes them: their queries side by side.

    queries: where their rows are in q;  keys: in k and v; None: their keys are in pages
    cu_queries int32 [num_seqs + 1]: where each begins among them
    max_queries, max_keys: of the longest
    key_arguments: where FlashAttention finds each sequence's keys
    """

    queries: Rows
    keys: Rows | None
    cu_queries: Tensor
    max_queries: int
    max_keys: int
    key_arguments: dict[str, Tensor]

    @classmethod
    def of(cls, layout: BatchLayout, pages: Tensor | None = None) -> "PackedSequences":
        """pages int32 [num_reqs, most pages]: vLLM's page table, where keys are in pages"""
        cu_queries = _sums(layout.columns[NUM_ROWS])
        if pages is None:
            cu_keys = _sums(layout.columns[KEY_LEN])
            keys = _rows(layout, KEY_START, KEY_LEN, cu_keys)
            arguments = {"cu_seqlens_k": cu_keys}
        else:
            keys = None
            table = pages[layout.columns[PAGE_ROW].long()]
            arguments = {"seqused_k": layout.columns[KEY_LEN].contiguous(), "block_table": table}
        return cls(
            _rows(layout, QUERY_START, NUM_ROWS, cu_queries),
            keys,
            cu_queries,
            int(layout.host[NUM_ROWS].max()),
            int(layout.host[KEY_LEN].max()),
            arguments,
        )


def _sums(counts: Tensor) -> Tensor:
    """int32 [n] -> int32 [n + 1]: 0, and the sum through each"""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _rows(layout: BatchLayout, start: int, count: int, sums: Tensor) -> Rows:
    starts, counts = layout.host[start], layout.host[count]
    if _are_adjacent(starts, counts):
        return slice(int(starts[0]), int(starts[-1] + counts[-1]))
    total = int(counts.sum())
    shifts = (layout.columns[start] - sums[:-1]).long()
    shifts = shifts.repeat_interleave(layout.columns[count].long(), output_size=total)
    return torch.arange(total, device=shifts.device) + shifts


def _are_adjacent(starts: NDArray[np.int32], counts: NDArray[np.int32]) -> bool:
    return bool((starts[1:] == starts[:-1] + counts[:-1]).all())


def _at(x: Tensor, rows: Rows) -> Tensor:
    """x[rows], without the host's time for a slice where those are all of its rows."""
    if isinstance(rows, slice) and rows.stop - rows.start == len(x):
        return x
    return x[rows]


class FlashAttention:
    """vLLM's varlen function; num_splits is fixed, so that batch mates cannot change a result."""

    def __init__(self, function: Callable[..., Any], version: int | None) -> None:
        self.function = function
        self.version = version

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: PackedSequences,
        *,
        scale: float,
        out: Tensor,
        return_lse: bool,
    ) -> Tensor | None:
        """Attend to everything; writes the sequences' rows of `out` and no others.

        k, v: pages [num_pages, PAGE, num_kv_heads, head_size] where their keys are in pages
        Returns the log-sum-exp, float32 [num_heads, rows of q], valid at the sequences' rows.
        """
        is_packed = isinstance(sequences.queries, slice)
        part = _at(out, sequences.queries)
        if sequences.keys is not None:
            k, v = _at(k, sequences.keys), _at(v, sequences.keys)
            if len(sequences.cu_queries) > 2:
                # A sequence's last tile weighs the values behind it with 0, and 0 * NaN is NaN.
                # The NaN of a sequence's own is in its keys as well, and stays.
                api.drop_nans(v)
        result, lse = self.function(
            _at(q, sequences.queries),
            k,
            v,
            max_seqlen_q=sequences.max_queries,
            cu_seqlens_q=sequences.cu_queries,
            max_seqlen_k=sequences.max_keys,
            softmax_scale=scale,
            causal=False,
            return_softmax_lse=True,
            out=part,
            fa_version=self.version,
            num_splits=1 if self.version == 3 else 0,
            **sequences.key_arguments,
        )[:2]
        if not is_packed:
            out[sequences.queries] = result
        if not return_lse or part.shape == out.shape:
            return lse if return_lse else None
        whole = lse.new_empty(lse.shape[0], q.shape[0])
        whole[:, sequences.queries] = lse
        return whole


@cache
def flash_attention(device_type: str, dtype: torch.dtype) -> FlashAttention | None:
    """FlashAttention where vLLM has it for this device and type; None: our own kernel runs."""
    if device_type != "cuda":
        logger.info("Dense and sparse steps run in plain torch: there is no GPU.")
        return None
    from vllm.v1.attention.backends import fa_utils

    # The function is there for every NVIDIA GPU; versions of it, from compute capability 8.0 on.
    exists = dtype != torch.float32 and fa_utils.is_flash_attn_varlen_func_available()
    version = fa_utils.get_flash_attn_version() if exists else None
    if version is None:
        logger.info("Dense steps run our Triton kernel: no FlashAttention for %s here.", dtype)
        return None
    logger.info("Dense steps run FlashAttention %s.", version)
    return FlashAttention(fa_utils.flash_attn_varlen_func, version)
