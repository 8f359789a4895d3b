# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: attention of each query block over the key blocks that its list names."""

import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.layout import QueryBlocks
from sparsed_vllm.kernels.reference import empty_attention
from sparsed_vllm.kernels.tiles import (
    FAR,
    LOG2_E,
    LOWEST,
    Tiles,
    attend,
    head_options,
    load_rows,
    store_attention,
)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: QueryBlocks,
    kept: Tensor,
    num_kept: Tensor,
    rows: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See reference.block_sparse_attention."""
    assert scale > 0, "the maximum is taken before scaling"
    out, lse = empty_attention(q, out, return_lse)
    tiles = Tiles.of(blocks.block_size, q)
    grid = (blocks.num_blocks * (blocks.block_size // tiles.rows), q.shape[1])
    if blocks.num_blocks:
        _block_sparse_attention_kernel[grid](
            *(q, k, v, out, lse),
            *(blocks.starts, blocks.lengths, blocks.indices, blocks.query_starts),
            *(kept, num_kept, rows),
            *(q.shape[0], scale * LOG2_E.value),
            *(stride for x in (q, k, v, out, kept, num_kept) for stride in x.stride()[:2]),
            GROUP=q.shape[1] // k.shape[1],
            BLOCK=blocks.block_size,
            RETURN_LSE=return_lse,
            **head_options(q),
            **tiles.options,
        )
    return out if lse is None else (out, lse)


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=[
        *("num_rows", "stride_kept_row", "stride_kept_head"),
        *("stride_num_row", "stride_num_head"),
    ],
    do_not_specialize_on_alignment=["kept_ptr", "num_kept_ptr"],  # a layer's part of a table
)
def _block_sparse_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    starts,
    lengths,
    indices,
    query_starts,
    kept_ptr,
    num_kept_ptr,
    rows_ptr,
    num_rows,
    scale_log2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_kept_row,
    stride_kept_head,
    stride_num_row,
    stride_num_head,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (query tile, head).

    The tiles of a head run together: with ascending lists they sweep its keys in step, and find
    most of them in the cache.
    """
    block = tl.program_id(0) // (BLOCK // ROWS)
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(starts + block).to(tl.int64)
    length = tl.load(lengths + block)
    first_row = tl.load(indices + block) * BLOCK + tl.program_id(0) % (BLOCK // ROWS) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    # Below 0 where q lacks the sequence's beginning; the tile's own rows are not.
    query_start = tl.load(query_starts + block).to(tl.int64)
    q_base = q_ptr + query_start * stride_qt + head * stride_qh
    k_base = k_ptr + start * stride_kt + head // GROUP * stride_kh
    v_base = v_ptr + start * stride_vt + head // GROUP * stride_vh
    table_row = tl.load(rows_ptr + block)
    ids = kept_ptr + table_row * stride_kept_row + head * stride_kept_head
    count = tl.load(num_kept_ptr + table_row * stride_num_row + head * stride_num_head)

    q = load_rows(q_base, 0, rows, length, stride_qt, HEAD_DIM, DIM, True)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], LOWEST, tl.float32)
    # Only the last listed block can be the sequence's last, partial one.
    whole = tl.maximum(count - 1, 0) * BLOCK // KEYS
    for tile in tl.range(0, whole):
        first, keys = _listed_keys(ids, count, tile, BLOCK, KEYS)
        k = load_rows(k_base, first, keys, length, stride_kt, HEAD_DIM, DIM, False)
        v = load_rows(v_base, first, keys, length, stride_vt, HEAD_DIM, DIM, False)
        acc, total, peak = attend(acc, total, peak, q, k, v, keys, scale_log2, False)
    for tile in tl.range(whole, tl.cdiv(count * BLOCK, KEYS)):
        first, keys = _listed_keys(ids, count, tile, BLOCK, KEYS)
        k = load_rows(k_base, first, keys, length, stride_kt, HEAD_DIM, DIM, True)
        v = load_rows(v_base, first, keys, length, stride_vt, HEAD_DIM, DIM, True)
        seen = first + keys < length
        acc, total, peak = attend(acc, total, peak, q, k, v, seen, scale_log2, True)

    out = out_ptr + query_start * stride_ot + head * stride_oh
    lse_offset = head * num_rows + query_start
    store_attention(
        acc,
        total,
        peak,
        out,
        lse_ptr,
        lse_offset,
        rows,
        length,
        stride_ot,
        HEAD_DIM,
        DIM,
        RETURN_LSE,
    )


@triton.jit
def _listed_keys(ids, count, tile, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """The tile-th KEYS places of the listed blocks laid end to end: first + offsets [KEYS]."""
    lanes = tl.arange(0, KEYS)
    if KEYS <= BLOCK:
        place = tile * KEYS
        first = tl.load(ids + place // BLOCK).to(tl.int32) * BLOCK + place % BLOCK
        offsets = lanes
    else:
        slots = tile * (KEYS // BLOCK) + lanes // BLOCK
        listed = tl.load(ids + slots, mask=slots < count, other=0).to(tl.int32)
        first = 0
        offsets = tl.where(slots < count, listed * BLOCK + lanes % BLOCK, FAR)
    return first, offsets
