# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: attention of each query block over the key blocks that its list names."""

import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.layout import BatchLayout, BlockTables
from sparsed_vllm.kernels.reference import empty_attention
from sparsed_vllm.kernels.tiles import (
    KEY_LEN,
    KEY_START,
    LOG2_E,
    LOWEST,
    NUM_ROWS,
    QUERY_START,
    Tiles,
    attend,
    column,
    find_row,
    find_tile,
    head_options,
    listed_keys,
    load_rows,
    store_attention,
)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    tables: BlockTables,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See reference.block_sparse_attention."""
    assert scale > 0, "the maximum is taken before scaling"
    out, lse = empty_attention(q, out, return_lse)
    tiles = Tiles.of(layout.tile, q)
    grid = (layout.num_tiles * (layout.tile // tiles.rows), q.shape[1])
    if layout.num_tiles:
        _block_sparse_attention_kernel[grid](
            q,
            k,
            v,
            out,
            lse,
            layout.columns,
            layout.num_seqs,
            tables.kept,
            tables.num_kept,
            tables.pages,
            scale * LOG2_E.value,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
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
            GROUP=q.shape[1] // k.shape[1],
            TILE=layout.tile,
            BLOCK=layout.block_size,
            RETURN_LSE=return_lse,
            **head_options(q),
            **tiles.options,
        )
    return out if lse is None else (out, lse)


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=[
        "num_seqs",
        "stride_lse_head",
        "stride_kept_page",
        "stride_kept_row",
        "stride_kept_head",
        "stride_num_page",
        "stride_num_row",
        "stride_num_head",
        "stride_pages",
    ],
    do_not_specialize_on_alignment=["columns", "kept_ptr", "num_kept_ptr", "pages_ptr"],
)
def _block_sparse_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    columns,
    num_seqs,
    kept_ptr,
    num_kept_ptr,
    pages_ptr,
    scale_log2,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
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
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (ROWS of a query block, head).

    The tiles of a head run together: with ascending lists they sweep its keys in step, and find
    most of them in the L2 cache.
    """
    sequence, index = find_tile(columns, num_seqs, tl.program_id(0) // (TILE // ROWS))
    head = tl.program_id(1).to(tl.int64)
    query_start = column(columns, num_seqs, QUERY_START, sequence).to(tl.int64)
    num_rows = column(columns, num_seqs, NUM_ROWS, sequence)
    key_start = column(columns, num_seqs, KEY_START, sequence).to(tl.int64)
    key_len = column(columns, num_seqs, KEY_LEN, sequence)
    rows = index * TILE + tl.program_id(0) % (TILE // ROWS) * ROWS + tl.arange(0, ROWS)
    q_base = q_ptr + query_start * stride_q_row + head * stride_q_head
    k_base = k_ptr + key_start * stride_k_row + head // GROUP * stride_k_head
    v_base = v_ptr + key_start * stride_v_row + head // GROUP * stride_v_head
    page, row = find_row(pages_ptr, stride_pages, columns, num_seqs, sequence, index, TILE)
    ids = kept_ptr + page * stride_kept_page + row * stride_kept_row + head * stride_kept_head
    num_kept = num_kept_ptr + page * stride_num_page + row * stride_num_row + head * stride_num_head
    count = tl.load(num_kept).to(tl.int32)

    q = load_rows(q_base, 0, rows, num_rows, stride_q_row, HEAD_DIM, DIM, True)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], LOWEST, tl.float32)
    # Only the last listed block can be the sequence's last, partial one.
    whole = tl.maximum(count - 1, 0) * BLOCK // KEYS
    for step in tl.range(0, whole):
        first, keys = listed_keys(ids, count, step, BLOCK, KEYS)
        k = load_rows(k_base, first, keys, key_len, stride_k_row, HEAD_DIM, DIM, False)
        v = load_rows(v_base, first, keys, key_len, stride_v_row, HEAD_DIM, DIM, False)
        acc, total, peak = attend(acc, total, peak, q, k, v, keys, scale_log2, False)
    for step in tl.range(whole, tl.cdiv(count * BLOCK, KEYS)):
        first, keys = listed_keys(ids, count, step, BLOCK, KEYS)
        k = load_rows(k_base, first, keys, key_len, stride_k_row, HEAD_DIM, DIM, True)
        v = load_rows(v_base, first, keys, key_len, stride_v_row, HEAD_DIM, DIM, True)
        seen = first + keys < key_len
        acc, total, peak = attend(acc, total, peak, q, k, v, seen, scale_log2, True)

    out = out_ptr + query_start * stride_out_row + head * stride_out_head
    lse = lse_ptr
    if RETURN_LSE:
        lse = lse_ptr + head * stride_lse_head + query_start
    store_attention(
        acc,
        total,
        peak,
        out,
        lse,
        rows,
        num_rows,
        stride_out_row,
        HEAD_DIM,
        DIM,
        RETURN_LSE,
    )
