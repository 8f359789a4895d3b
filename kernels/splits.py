# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the Triton kernels for a few rows over many pages share: how keys are split, and merged.

The rows of one sequence are too few to occupy a GPU, so its keys are split among programs, and a
second kernel merges what these found. How many splits there are follows from the sequence's own
rows and keys: its result depends on itself alone. The grid follows the layout's `host`, which in a
CUDA graph holds bounds; programs beyond a sequence's end return at once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.layout import BatchLayout
from sparsed_vllm.kernels.tiles import (
    KEY_LEN,
    LEAST_KEYS,
    LN_2,
    LOWEST,
    NUM_ROWS,
    QUERY_START,
    column,
    head_options,
)

MERGED_ROWS = tl.constexpr(16)  # of a program that merges


@dataclass(frozen=True)
class SplitTiles:
    """How the attention of a few rows is cut for one tile, number of grouped heads, and type.

    rows: of a program: rows of the sequence, each with the query heads of a key head
    keys: of a step, at most a page
    programs: that a sequence's work is split into, at most
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    programs: int

    @classmethod
    def of(cls, tile: int, group: int, q: Tensor) -> "SplitTiles":
        """Two programs for each of an H100's 132 multiprocessors, at once or in two rounds."""
        if q.dtype == torch.float32:  # no tensor cores, and operands held in registers
            return cls(16, 32, num_warps=4, num_stages=1, programs=264)
        rows = min(triton.next_power_of_2(tile * group), 128 if q.shape[2] <= 128 else 64)
        if rows == 128:
            return cls(rows, 128, num_warps=8, num_stages=3, programs=264)
        return cls(rows, 64, num_warps=4, num_stages=2 if q.shape[2] > 128 else 3, programs=264)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "ROWS": self.rows,
            "KEYS": self.keys,
            "PROGRAMS": self.programs,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class Parts:
    """What splits find, until they are merged.

    Of one split of a tile of rows of a head, where a sequence's keys are split:
    sums float32 [parts, rows, DIM]: values weighted by exp2(logit - peak)
    scales float32 [parts, 2, rows]: peak, and the sum of the weights

    counts int32 [num_seqs, tiles, heads]: splits of each tile
    programs: of a sequence, at most
    unit: keys that are not split: those of a page, or of a block
    """

    sums: Tensor
    scales: Tensor
    counts: Tensor
    programs: int
    unit: int

    @classmethod
    def of(
        cls, q: Tensor, layout: BatchLayout, heads: int, tiles: SplitTiles, unit: int
    ) -> "Parts":
        """heads: that have keys of their own"""
        group, least = q.shape[1] // heads, LEAST_KEYS.value // unit
        splits = -(-layout.host[KEY_LEN.value] // unit) // least
        num_tiles = -(-layout.host[NUM_ROWS.value] * group // tiles.rows)
        # Of fewer rows than `host` says there may be more splits, but never more parts than these.
        parts = np.minimum(tiles.programs, splits * num_tiles * heads) * (splits > 1)
        parts *= tiles.programs // heads > 1
        shape = (int(parts.sum()), tiles.rows)
        return cls(
            q.new_empty((*shape, head_options(q)["DIM"]), dtype=torch.float32),
            q.new_empty((shape[0], 2, shape[1]), dtype=torch.float32),
            q.new_empty((layout.num_seqs, int(num_tiles.max()), heads), dtype=torch.int32),
            int(np.maximum(parts, num_tiles * heads).max()),
            unit,
        )

    def merge(self, out: Tensor, lse: Tensor | None, layout: BatchLayout, programs: int) -> None:
        """Write the rows whose keys were split; out and lse as in reference.paged_attention."""
        if not len(self.sums):
            return
        num_seqs, num_tiles, heads = self.counts.shape
        rows = self.sums.shape[1]
        _merge_kernel[(num_tiles * heads * (rows // MERGED_ROWS.value), num_seqs)](
            self.sums,
            self.scales,
            self.counts,
            out,
            lse,
            layout.columns,
            layout.num_seqs,
            out.stride(0),
            out.stride(1),
            out.shape[0],
            HEADS=heads,
            GROUP=out.shape[1] // heads,
            UNIT=self.unit,
            PROGRAMS=programs,
            RETURN_LSE=lse is not None,
            ROWS=rows,
            **head_options(out),
            num_warps=4,
        )


@triton.jit
def grouped_rows(first, head, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Rows of a sequence and their query heads, [ROWS] each: all heads of a row side by side."""
    places = first + tl.arange(0, ROWS)
    return places // GROUP, head * GROUP + places % GROUP


@triton.jit
def load_grouped(
    base, rows, heads, inside, stride_row, stride_head, HEAD_DIM: tl.constexpr, DIM: tl.constexpr
):
    """[len(rows), DIM] of the matrix whose row 0 and head 0 are at `base`; zeros outside."""
    dims = tl.arange(0, DIM)
    pointers = base + (rows.to(tl.int64) * stride_row + heads * stride_head)[:, None]
    return tl.load(
        pointers + dims[None, :], mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0
    )


@triton.jit
def num_splits(num_units, num_programs, UNIT: tl.constexpr, PROGRAMS: tl.constexpr):
    """Splits of num_units pages or blocks;  num_programs: that a sequence has for each split"""
    most = PROGRAMS // tl.maximum(num_programs, 1)
    return tl.maximum(tl.minimum(most, num_units // (LEAST_KEYS // UNIT)), 1)


@triton.jit
def _first_part(
    columns,
    num_seqs,
    sequence,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Where a sequence's parts begin: behind as many as the sequences before it may have."""
    lanes = tl.arange(0, 64)
    total = tl.zeros([64], tl.int32)
    for first in range(0, sequence, 64):
        before = first + lanes < sequence
        own = columns + first + lanes
        num_rows = tl.load(own + NUM_ROWS * num_seqs, mask=before, other=0)
        key_lens = tl.load(own + KEY_LEN * num_seqs, mask=before, other=0)
        programs = tl.cdiv(num_rows * GROUP, ROWS) * HEADS
        splits = num_splits(tl.cdiv(key_lens, UNIT), programs, UNIT, PROGRAMS)
        total += tl.where(splits > 1, splits * programs, 0)
    return tl.sum(total, 0).to(tl.int64)


@triton.jit
def store_split(
    acc,
    total,
    peak,
    rows,
    heads,
    inside,
    out,
    lse,
    sums_ptr,
    scales_ptr,
    counts_ptr,
    columns,
    num_seqs,
    split,
    count,
    sequence,
    tile,
    num_tiles,
    most_tiles,
    head,
    stride_out_row,
    stride_out_head,
    stride_lse_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    RETURN_LSE: tl.constexpr,
):
    """Writes what one split found: to its part or, where there is no other, to the result.

    out, lse: where the sequence's first row and head 0 are
    """
    if split == 0:
        tl.store(counts_ptr + (sequence * most_tiles + tile) * HEADS + head, count)
    if count == 1:
        _store_rows(
            acc,
            total,
            peak,
            rows,
            heads,
            inside,
            out,
            lse,
            stride_out_row,
            stride_out_head,
            stride_lse_head,
            HEAD_DIM,
            DIM,
            RETURN_LSE,
        )
    else:
        part = (split * num_tiles + tile) * HEADS + head
        part += _first_part(columns, num_seqs, sequence, HEADS, GROUP, ROWS, UNIT, PROGRAMS)
        lanes = tl.arange(0, ROWS)
        sums = sums_ptr + (part * ROWS + lanes)[:, None] * DIM + tl.arange(0, DIM)[None, :]
        tl.store(sums, acc)
        tl.store(scales_ptr + part * 2 * ROWS + lanes, peak)
        tl.store(scales_ptr + part * 2 * ROWS + ROWS + lanes, total)


@triton.jit
def _store_rows(
    acc,
    total,
    peak,
    rows,
    heads,
    inside,
    out,
    lse,
    stride_out_row,
    stride_out_head,
    stride_lse_head,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    RETURN_LSE: tl.constexpr,
):
    """Writes rows of a finished softmax; zeros and -inf where nothing was seen."""
    dims = tl.arange(0, DIM)
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    pointers = out + (rows.to(tl.int64) * stride_out_row + heads * stride_out_head)[:, None]
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers + dims[None, :], result.to(out.dtype.element_ty), mask=mask)
    if RETURN_LSE:
        places = lse + heads.to(tl.int64) * stride_lse_head + rows
        tl.store(places, (peak + tl.log2(total)) * LN_2, mask=inside)


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=["num_seqs", "stride_lse_head"],
    do_not_specialize_on_alignment=["columns", "counts_ptr", "lse_ptr"],
)
def _merge_kernel(
    sums_ptr,
    scales_ptr,
    counts_ptr,
    out_ptr,
    lse_ptr,
    columns,
    num_seqs,
    stride_out_row,
    stride_out_head,
    stride_lse_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Program (MERGED_ROWS of a tile of a head, sequence): adds the parts up in their order."""
    sequence = tl.program_id(1)
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * MERGED_ROWS
    num_rows = column(columns, num_seqs, NUM_ROWS, sequence)
    if first >= num_rows * GROUP:
        return
    # Without keys nothing was counted.
    if column(columns, num_seqs, KEY_LEN, sequence) == 0:
        return
    tile = first // ROWS
    most_tiles = tl.num_programs(0) // HEADS * MERGED_ROWS // ROWS
    count = tl.load(counts_ptr + (sequence * most_tiles + tile) * HEADS + head)
    if count == 1:
        return
    lanes = first % ROWS + tl.arange(0, MERGED_ROWS)
    dims = tl.arange(0, DIM)
    num_tiles = tl.cdiv(num_rows * GROUP, ROWS)
    acc = tl.zeros([MERGED_ROWS, DIM], tl.float32)
    total = tl.zeros([MERGED_ROWS], tl.float32)
    peak = tl.full([MERGED_ROWS], LOWEST, tl.float32)
    own = _first_part(columns, num_seqs, sequence, HEADS, GROUP, ROWS, UNIT, PROGRAMS)
    for split in range(count):
        part = own + (split * num_tiles + tile) * HEADS + head
        sums = tl.load(sums_ptr + (part * ROWS + lanes)[:, None] * DIM + dims[None, :])
        its_peak = tl.load(scales_ptr + part * 2 * ROWS + lanes)
        its_total = tl.load(scales_ptr + part * 2 * ROWS + ROWS + lanes)
        new_peak = tl.maximum(peak, its_peak)
        decay, weight = tl.exp2(peak - new_peak), tl.exp2(its_peak - new_peak)
        acc = acc * decay[:, None] + sums * weight[:, None]
        total = total * decay + its_total * weight
        peak = new_peak
    rows, heads = grouped_rows(first, head, MERGED_ROWS, GROUP)
    query_start = column(columns, num_seqs, QUERY_START, sequence).to(tl.int64)
    _store_rows(
        acc,
        total,
        peak,
        rows,
        heads,
        rows < num_rows,
        out_ptr + query_start * stride_out_row,
        lse_ptr + query_start if RETURN_LSE else lse_ptr,
        stride_out_row,
        stride_out_head,
        stride_lse_head,
        HEAD_DIM,
        DIM,
        RETURN_LSE,
    )
