# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: bidirectional attention over all keys of each sequence of a packed batch."""

import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.layout import QueryBlocks
from sparsed_vllm.kernels.reference import empty_attention
from sparsed_vllm.kernels.tiles import (
    LOG2_E,
    LOWEST,
    Tiles,
    attend,
    head_options,
    load_rows,
    store_attention,
)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: QueryBlocks,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See reference.dense_attention."""
    assert scale > 0, "the maximum is taken before scaling"
    out, lse = empty_attention(q, out, return_lse)
    tiles = Tiles.of(blocks.block_size, q)
    grid = (blocks.num_blocks * (blocks.block_size // tiles.rows), q.shape[1])
    if blocks.num_blocks:
        _dense_attention_kernel[grid](
            *(q, k, v, out, lse),
            *(blocks.starts, blocks.lengths, blocks.indices, blocks.query_starts),
            *(q.shape[0], scale * LOG2_E.value),
            *(stride for x in (q, k, v, out) for stride in x.stride()[:2]),
            GROUP=q.shape[1] // k.shape[1],
            BLOCK=blocks.block_size,
            RETURN_LSE=return_lse,
            **head_options(q),
            **tiles.options,
        )
    return out if lse is None else (out, lse)


@triton.jit(do_not_specialize=["num_rows"])  # else compiled anew for what divides it
def _dense_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    starts,
    lengths,
    indices,
    query_starts,
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
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (query tile, head); the tiles of a head run together, so that they share its keys."""
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

    q = load_rows(q_base, 0, rows, length, stride_qt, HEAD_DIM, DIM, True)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], LOWEST, tl.float32)
    lanes = tl.arange(0, KEYS)
    whole = length // KEYS * KEYS
    for first in tl.range(0, whole, KEYS):
        k = load_rows(k_base, first, lanes, length, stride_kt, HEAD_DIM, DIM, False)
        v = load_rows(v_base, first, lanes, length, stride_vt, HEAD_DIM, DIM, False)
        acc, total, peak = attend(acc, total, peak, q, k, v, lanes, scale_log2, False)
    if whole < length:
        k = load_rows(k_base, whole, lanes, length, stride_kt, HEAD_DIM, DIM, True)
        v = load_rows(v_base, whole, lanes, length, stride_vt, HEAD_DIM, DIM, True)
        seen = whole + lanes < length
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
