# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the Triton kernels share: where a tile lies, loads, and one step of the online softmax."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels import layout

QUERY_START = tl.constexpr(layout.QUERY_START)
NUM_ROWS = tl.constexpr(layout.NUM_ROWS)
FIRST_ROW = tl.constexpr(layout.FIRST_ROW)
KEY_START = tl.constexpr(layout.KEY_START)
KEY_LEN = tl.constexpr(layout.KEY_LEN)
PAGE_ROW = tl.constexpr(layout.PAGE_ROW)
TILE_START = tl.constexpr(layout.TILE_START)
FIRST_GEN = tl.constexpr(layout.FIRST_GEN)
KEEP_ALL = tl.constexpr(layout.KEEP_ALL)
KEEP_GEN = tl.constexpr(layout.KEEP_GEN)
PAGE = tl.constexpr(layout.PAGE)
LEAST_KEYS = tl.constexpr(layout.LEAST_KEYS)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(1 << 30)  # a place past every sequence's end
# Where a running maximum begins. From -inf, a row that has seen nothing but -inf would subtract
# -inf from -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@dataclass(frozen=True)
class Tiles:
    """How an attention kernel is cut for one number of query rows, head size and type.

    rows: query rows of a program; divides those of a tile
    keys: keys of a step
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, tile: int, q: Tensor) -> "Tiles":
        """Sized for the 227 KiB of shared memory of an H100: q, and k and v of every stage."""
        if q.dtype == torch.float32:  # no tensor cores, and operands held in registers
            return cls(min(tile, 32), 32, num_warps=4, num_stages=1)
        if tile < 64:
            return cls(tile, 64, num_warps=4, num_stages=2)
        keys = 128 if q.shape[2] <= 128 else 64
        return cls(tile, keys, num_warps=tile // 16, num_stages=2)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "ROWS": self.rows,
            "KEYS": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def head_options(q: Tensor) -> dict[str, int]:
    """DIM: a tile's width, which must be a power of two where a head's size need not be."""
    return {"HEAD_DIM": q.shape[2], "DIM": triton.next_power_of_2(q.shape[2])}


@triton.jit
def column(columns, num_seqs, NUMBER: tl.constexpr, sequence):
    """One number of a layout, or of a selection: NUMBER is the column."""
    return tl.load(columns + NUMBER * num_seqs + sequence)


@triton.jit
def find_tile(columns, num_seqs, tile):
    """The sequence that a tile belongs to, and the tile's index in it.

    A binary search for the last sequence that begins at or before the tile: of sequences that
    begin at the same tile, only the last can have tiles.
    """
    low = tile * 0
    high = low + num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        begun = column(columns, num_seqs, TILE_START, middle) <= tile
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    return low, tile - column(columns, num_seqs, TILE_START, low)


@triton.jit
def find_row(pages_ptr, stride_pages, columns, num_seqs, sequence, index, tile):
    """The page, and the row in it, of the lists of a sequence's index-th tile.

    The page is int64, as pages times numbers a page outgrow int32.
    """
    block = column(columns, num_seqs, FIRST_ROW, sequence) // tile + index
    page_row = column(columns, num_seqs, PAGE_ROW, sequence).to(tl.int64)
    page = tl.load(pages_ptr + page_row * stride_pages + block * tile // PAGE)
    return page.to(tl.int64), block % (PAGE // tile)


@triton.jit
def listed_keys(ids, count, step, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """The step-th KEYS places of the listed blocks laid end to end: first + offsets [KEYS]."""
    lanes = tl.arange(0, KEYS)
    if KEYS <= BLOCK:
        place = step * KEYS
        first = tl.load(ids + place // BLOCK).to(tl.int32) * BLOCK + place % BLOCK
        offsets = lanes
    else:
        slots = step * (KEYS // BLOCK) + lanes // BLOCK
        listed = tl.load(ids + slots, mask=slots < count, other=0).to(tl.int32)
        first = 0
        offsets = tl.where(slots < count, listed * BLOCK + lanes % BLOCK, FAR)
    return first, offsets


@triton.jit
def in_page(table, first, offsets, end, SCATTERED: tl.constexpr):
    """Where the places first + offsets of a sequence are, as its row of the page table says.

    Returns their page, and first, offsets and end within it.  SCATTERED: they may be in several
    pages, [len(offsets), 1]; else `first` and all others are in one. The page is int64, as pages
    times numbers a page outgrow int32.
    """
    if SCATTERED:
        inside = first + offsets < end
        page = tl.load(table + (first + offsets) // PAGE, mask=inside, other=0)[:, None]
        offsets = tl.where(inside, (first + offsets) % PAGE, FAR)
        first = 0
        end = PAGE
    else:
        page = tl.load(table + first // PAGE)
        start = first // PAGE * PAGE
        first -= start
        end -= start
    return page.to(tl.int64), first, offsets, end


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

    stride: from row to row.  Zeros past HEAD_DIM and, if MASKED, from row `end` on: what lies
    there may be a neighbour's NaN, and 0 * NaN is NaN.
    """
    dims = tl.arange(0, DIM)
    # `first` apart from the offsets, which a loop of whole blocks then need not compute anew. Both
    # in int64: a row number times a stride outgrows int32.
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
    # The maximum is taken of raw products, so that the scaling fuses with the subtraction (FMA).
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
    lse,
    rows,
    end,
    stride,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    RETURN_LSE: tl.constexpr,
):
    """Writes the rows below `end` of a finished softmax; zeros and -inf where nothing was seen.

    out, lse: where the sequence's first row and the head are
    """
    dims = tl.arange(0, DIM)
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    pointers = out + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    mask = (rows < end)[:, None] & (dims[None, :] < HEAD_DIM)
    tl.store(pointers, result.to(out.dtype.element_ty), mask=mask)
    if RETURN_LSE:
        tl.store(lse + rows, (peak + tl.log2(total)) * LN_2, mask=rows < end)
