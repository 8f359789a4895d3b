# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: attention of a few query blocks over the key blocks that their lists name, in pages."""

import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.layout import BatchLayout, BlockTables
from sparsed_vllm.kernels.reference import empty_attention
from sparsed_vllm.kernels.splits import Parts, SplitTiles, num_splits, store_split
from sparsed_vllm.kernels.tiles import (
    KEY_LEN,
    LOG2_E,
    LOWEST,
    NUM_ROWS,
    PAGE_ROW,
    QUERY_START,
    attend,
    column,
    find_row,
    head_options,
    in_page,
    listed_keys,
    load_rows,
)


def paged_block_sparse_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: BatchLayout,
    tables: BlockTables,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
    tiles: SplitTiles | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See reference.paged_block_sparse_attention. tiles: None: the ones that suit the sizes"""
    assert scale > 0, "the maximum is taken before scaling"
    out, lse = empty_attention(q, out, return_lse)
    heads = q.shape[1]
    tiles = tiles or SplitTiles.of(layout.tile, 1, q)
    if layout.max_key_len and layout.max_num_rows:
        parts = Parts.of(q, layout, heads, tiles, layout.block_size)
        _paged_block_sparse_attention_kernel[(parts.programs, layout.num_seqs)](
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
            tables.kept,
            tables.num_kept,
            tables.pages,
            scale * LOG2_E.value,
            q.stride(0),
            q.stride(1),
            keys.stride(0),
            keys.stride(1),
            keys.stride(2),
            out.stride(0),
            out.stride(1),
            q.shape[0],
            tables.kept.stride(0),
            tables.kept.stride(1),
            tables.kept.stride(2),
            tables.num_kept.stride(0),
            tables.num_kept.stride(1),
            tables.num_kept.stride(2),
            tables.pages.stride(0),
            HEADS=heads,
            GROUP=heads // keys.shape[2],
            TILE=layout.tile,
            BLOCK=layout.block_size,
            RETURN_LSE=return_lse,
            **head_options(q),
            **tiles.options,
        )
        parts.merge(out, lse, layout, tiles.programs)
    return out if lse is None else (out, lse)


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=[
        "num_seqs",
        "most_tiles",
        "stride_lse_head",
        "stride_kept_page",
        "stride_kept_row",
        "stride_kept_head",
        "stride_num_page",
        "stride_num_row",
        "stride_num_head",
        "stride_pages",
    ],
    do_not_specialize_on_alignment=[
        "columns",
        "kept_ptr",
        "num_kept_ptr",
        "pages_ptr",
        "counts_ptr",
        "lse_ptr",
    ],
)
def _paged_block_sparse_attention_kernel(
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
    kept_ptr,
    num_kept_ptr,
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
    stride_kept_page,
    stride_kept_row,
    stride_kept_head,
    stride_num_page,
    stride_num_row,
    stride_num_head,
    stride_pages,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Program (split of a list, head, and ROWS of a query block; sequence).

    Heads of a group list different blocks, so that each attends for itself.
    """
    sequence = tl.program_id(1)
    num_rows = column(columns, num_seqs, NUM_ROWS, sequence)
    key_len = column(columns, num_seqs, KEY_LEN, sequence)
    num_tiles = tl.cdiv(num_rows, ROWS)
    if (num_rows == 0) | (key_len == 0):
        return
    split = tl.program_id(0) // (num_tiles * HEADS)
    head = tl.program_id(0) // num_tiles % HEADS
    tile = tl.program_id(0) % num_tiles
    block = tile * ROWS // TILE
    list_page, list_row = find_row(
        pages_ptr, stride_pages, columns, num_seqs, sequence, block, TILE
    )
    num_kept = num_kept_ptr + list_page * stride_num_page
    kept = tl.load(num_kept + list_row * stride_num_row + head * stride_num_head).to(tl.int32)
    count = num_splits(kept, num_tiles * HEADS, BLOCK, PROGRAMS)
    if split >= count:
        return
    first, end = kept * split // count, kept * (split + 1) // count
    ids = kept_ptr + list_page * stride_kept_page + list_row * stride_kept_row
    ids += head * stride_kept_head + first
    query_start = column(columns, num_seqs, QUERY_START, sequence).to(tl.int64)
    page_row = column(columns, num_seqs, PAGE_ROW, sequence).to(tl.int64)
    table = pages_ptr + page_row * stride_pages
    k_base = keys_ptr + head // GROUP * stride_key_head
    v_base = values_ptr + head // GROUP * stride_key_head

    rows = tile * ROWS + tl.arange(0, ROWS)
    q_base = q_ptr + query_start * stride_q_row + head * stride_q_head
    q = load_rows(q_base, 0, rows, num_rows, stride_q_row, HEAD_DIM, DIM, True)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], LOWEST, tl.float32)
    # Only the last listed block can be the sequence's last, partial one.
    listed = end - first
    whole = (listed - tl.where((end == kept) & (listed > 0), 1, 0)) * BLOCK // KEYS
    for step in tl.range(0, whole):
        place, lanes = listed_keys(ids, listed, step, BLOCK, KEYS)
        page, place, lanes, past = in_page(table, place, lanes, key_len, KEYS > BLOCK)
        page *= stride_page
        k = load_rows(k_base + page, place, lanes, past, stride_key, HEAD_DIM, DIM, False)
        v = load_rows(v_base + page, place, lanes, past, stride_key, HEAD_DIM, DIM, False)
        acc, total, peak = attend(acc, total, peak, q, k, v, lanes, scale_log2, False)
    for step in tl.range(whole, tl.cdiv(listed * BLOCK, KEYS)):
        place, lanes = listed_keys(ids, listed, step, BLOCK, KEYS)
        page, place, lanes, past = in_page(table, place, lanes, key_len, KEYS > BLOCK)
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
        rows * 0 + head,
        rows < num_rows,
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
        1,
        BLOCK,
        PROGRAMS,
        HEAD_DIM,
        DIM,
        ROWS,
        RETURN_LSE,
    )
