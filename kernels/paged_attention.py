# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: attention of a few query rows over all keys of their sequence, which are in pages."""

import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.layout import BatchLayout
from sparsed_vllm.kernels.reference import empty_attention
from sparsed_vllm.kernels.splits import (
    Parts,
    SplitTiles,
    grouped_rows,
    load_grouped,
    num_splits,
    store_split,
)
from sparsed_vllm.kernels.tiles import (
    KEY_LEN,
    LOG2_E,
    LOWEST,
    NUM_ROWS,
    PAGE,
    PAGE_ROW,
    QUERY_START,
    attend,
    column,
    head_options,
    in_page,
    load_rows,
)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: BatchLayout,
    pages: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
    tiles: SplitTiles | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See reference.paged_attention. tiles: None: the ones that suit the sizes"""
    assert scale > 0, "the maximum is taken before scaling"
    out, lse = empty_attention(q, out, return_lse)
    heads = keys.shape[2]
    tiles = tiles or SplitTiles.of(layout.tile, q.shape[1] // heads, q)
    if layout.max_key_len and layout.max_num_rows:
        parts = Parts.of(q, layout, heads, tiles, PAGE.value)
        _paged_attention_kernel[(parts.programs, layout.num_seqs)](
            q,
            keys,
            values,
            out,
            lse,
            parts.sums,
            parts.scales,
            parts.counts,
            parts.counts.shape[1],
            layout.columns,
            layout.num_seqs,
            pages,
            scale * LOG2_E.value,
            q.stride(0),
            q.stride(1),
            keys.stride(0),
            keys.stride(1),
            keys.stride(2),
            out.stride(0),
            out.stride(1),
            q.shape[0],
            pages.stride(0),
            HEADS=heads,
            GROUP=q.shape[1] // heads,
            RETURN_LSE=return_lse,
            **head_options(q),
            **tiles.options,
        )
        parts.merge(out, lse, layout, tiles.programs)
    return out if lse is None else (out, lse)


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=["num_seqs", "most_tiles", "stride_lse_head", "stride_pages"],
    do_not_specialize_on_alignment=["columns", "pages_ptr", "counts_ptr", "lse_ptr"],
)
def _paged_attention_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    lse_ptr,
    sums_ptr,
    scales_ptr,
    counts_ptr,
    most_tiles,
    columns,
    num_seqs,
    pages_ptr,
    scale_log2,
    stride_q_row,
    stride_q_head,
    stride_page,
    stride_key,
    stride_key_head,
    stride_out_row,
    stride_out_head,
    stride_lse_head,
    stride_pages,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Program (split, key head and tile of rows; sequence).

    Tiles come first: they share keys. Then heads, which share the rows of DRAM.
    """
    sequence = tl.program_id(1)
    num_rows = column(columns, num_seqs, NUM_ROWS, sequence)
    key_len = column(columns, num_seqs, KEY_LEN, sequence)
    num_tiles = tl.cdiv(num_rows * GROUP, ROWS)
    if (num_rows == 0) | (key_len == 0):
        return
    split = tl.program_id(0) // (num_tiles * HEADS)
    head = tl.program_id(0) // num_tiles % HEADS
    tile = tl.program_id(0) % num_tiles
    num_pages = tl.cdiv(key_len, PAGE)
    count = num_splits(num_pages, num_tiles * HEADS, PAGE, PROGRAMS)
    if split >= count:
        return
    first, end = num_pages * split // count, num_pages * (split + 1) // count
    query_start = column(columns, num_seqs, QUERY_START, sequence).to(tl.int64)
    page_row = column(columns, num_seqs, PAGE_ROW, sequence).to(tl.int64)
    table = pages_ptr + page_row * stride_pages
    k_base = keys_ptr + head * stride_key_head
    v_base = values_ptr + head * stride_key_head

    rows, heads = grouped_rows(tile * ROWS, head, ROWS, GROUP)
    inside = rows < num_rows
    q_base = q_ptr + query_start * stride_q_row
    q = load_grouped(q_base, rows, heads, inside, stride_q_row, stride_q_head, HEAD_DIM, DIM)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], LOWEST, tl.float32)
    lanes = tl.arange(0, KEYS)
    last = tl.minimum(end * PAGE, key_len)
    whole = last // KEYS
    for step in tl.range(first * (PAGE // KEYS), whole):
        page, place, _, past = in_page(table, step * KEYS, lanes, last, False)
        page *= stride_page
        k = load_rows(k_base + page, place, lanes, past, stride_key, HEAD_DIM, DIM, False)
        v = load_rows(v_base + page, place, lanes, past, stride_key, HEAD_DIM, DIM, False)
        acc, total, peak = attend(acc, total, peak, q, k, v, lanes, scale_log2, False)
    if whole * KEYS < last:
        page, place, _, past = in_page(table, whole * KEYS, lanes, last, False)
        page *= stride_page
        k = load_rows(k_base + page, place, lanes, past, stride_key, HEAD_DIM, DIM, True)
        v = load_rows(v_base + page, place, lanes, past, stride_key, HEAD_DIM, DIM, True)
        seen = place + lanes < past
        acc, total, peak = attend(acc, total, peak, q, k, v, seen, scale_log2, True)

    store_split(
        acc,
        total,
        peak,
        rows,
        heads,
        inside,
        out_ptr + query_start * stride_out_row,
        lse_ptr + query_start if RETURN_LSE else lse_ptr,
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
        HEADS,
        GROUP,
        PAGE,
        PROGRAMS,
        HEAD_DIM,
        DIM,
        ROWS,
        RETURN_LSE,
    )
