# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the Triton kernels share: tile sizes, loads, and one step of the online softmax."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(1 << 30)  # a place past every sequence's end
LOWEST = tl.constexpr(-3.4028234663852886e38)  # where a running maximum begins: -inf would give NaN


@dataclass(frozen=True)
class Tiles:
    """How an attention kernel is cut for one block size, head size and type."""

    rows: int  # queries of a program; divides the block size
    keys: int  # of a step
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, block_size: int, q: Tensor) -> "Tiles":
        """Sized for the 227 KiB of shared memory of an H100: q, and k and v of every stage."""
        if q.dtype == torch.float32:  # no tensor cores, and operands held in registers
            return cls(min(block_size, 32), 32, num_warps=4, num_stages=1)
        if block_size < 64:
            return cls(block_size, 64, num_warps=4, num_stages=2)
        keys = 128 if q.shape[2] <= 128 else 64
        return cls(block_size, keys, num_warps=block_size // 16, num_stages=2)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "ROWS": self.rows,
            "KEYS": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def head_options(q: Tensor) -> dict[str, int]:
    """A tile's width is a power of two, a head's may not be."""
    return {"HEAD_DIM": q.shape[2], "DIM": triton.next_power_of_2(q.shape[2])}


@triton.jit
def load_rows(
    base,
    first,
    offsets,
    end,
    stride,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows first + offsets of the matrix at `base`, [len(offsets), DIM].

    stride: from row to row.  Zeros past HEAD_DIM and, if MASKED, from row `end` on.
    """
    dims = tl.arange(0, DIM)
    # `first` apart from the offsets: these stay the same over a loop of whole blocks. Both are
    # widened first: a row number times a stride outgrows int32.
    base += (first + tl.full([], 0, tl.int64)) * stride
    pointers = base + (offsets.to(tl.int64)[:, None] * stride + dims[None, :])
    mask = dims[None, :] < HEAD_DIM
    if MASKED:
        mask = mask & (first + offsets < end)[:, None]
    if MASKED or HEAD_DIM != DIM:
        rows = tl.load(pointers, mask=mask, other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def attend(acc, total, peak, q, k, v, seen, scale_log2, MASKED: tl.constexpr):
    """One step of the online softmax over a tile of keys.

    acc [rows, DIM] values weighted by exp2(logit - peak), total [rows] the sum of the weights,
    peak [rows] the highest logit so far; logits in units of log 2.  seen bool [keys], if MASKED
    """
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        logits = tl.where(seen[None, :], logits, float("-inf"))
    # The maximum of raw products: the scaling below then fuses with the subtraction.
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale_log2)
    weights = tl.exp2(logits * scale_log2 - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, total, new_peak


@triton.jit
def store_attention(
    acc,
    total,
    peak,
    out,
    lse_ptr,
    lse_offset,
    rows,
    end,
    stride,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    RETURN_LSE: tl.constexpr,
):
    """Writes the rows below `end` of a finished softmax; zeros and -inf where nothing was seen.

    out and lse_ptr + lse_offset: at the sequence's first token and the head; rows: in the sequence
    """
    dims = tl.arange(0, DIM)
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    pointers = out + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    mask = (rows < end)[:, None] & (dims[None, :] < HEAD_DIM)
    tl.store(pointers, result.to(out.dtype.element_ty), mask=mask)
    if RETURN_LSE:
        tl.store(lse_ptr + lse_offset + rows, (peak + tl.log2(total)) * LN_2, mask=rows < end)
