# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: block scores -> ascending lists of kept key blocks, on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.layout import QueryBlocks, Span, Window

WIDTHS = tuple(256 * 4**i for i in range(6))  # the last for four million tokens in blocks of 16


def select_blocks(
    scores: Tensor,
    gen_scores: Tensor,
    blocks: QueryBlocks,
    kept: Tensor,
    num_kept: Tensor,
    rows: Tensor,
) -> None:
    """See reference.select_blocks. Scores of real blocks are at least 0."""
    assert scores.stride() == gen_scores.stride() and scores.stride(2) == 1
    assert kept.shape[2] >= blocks.most_kept, "the table is narrower than its rows"
    width = width_for(blocks.max_key_blocks)
    if blocks.num_blocks:
        _select_blocks_kernel[(blocks.num_blocks, scores.shape[0])](
            *(scores, gen_scores),
            *(blocks.lengths, blocks.first_gens, blocks.keep_all, blocks.keep_gen),
            *(kept, num_kept, rows, kept.shape[2]),
            *(*scores.stride()[:2], *kept.stride()[:2], *num_kept.stride()),
            blocks.block_size,
            WIDTH=width,
            num_warps=min(max(width // 256, 1), 8),
        )


def width_for(key_blocks: int) -> int:
    """Lanes of a program that selects from so many blocks: few sizes, as each is compiled."""
    return next(width for width in WIDTHS if width >= key_blocks)


def compile_up_to(
    key_blocks: int, num_heads: int, ids: torch.dtype, device: torch.device | str
) -> None:
    """Compile what sequences of up to `key_blocks` need, before one of them comes.

    ids: the type of the table
    """
    for width in WIDTHS[: WIDTHS.index(width_for(key_blocks)) + 1]:
        _select_for_nobody(min(width, key_blocks), num_heads, ids, device)


def _select_for_nobody(
    key_blocks: int, num_heads: int, ids: torch.dtype, device: torch.device | str
) -> None:
    """A selection for one query block of a sequence of `key_blocks`."""
    size = 16
    span = Span(0, key_blocks * size, 0, window=Window(0, 0, size))
    blocks = QueryBlocks.of([span], size, device)
    scores, gen_scores = (torch.zeros(num_heads, 1, key_blocks, device=device) for _ in range(2))
    kept = torch.empty(1, num_heads, blocks.most_kept, dtype=ids, device=device)
    num_kept = torch.empty(1, num_heads, dtype=torch.int32, device=device)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    select_blocks(scores, gen_scores, blocks, kept, num_kept, rows)


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=[
        *("kept_width", "stride_scores_head", "stride_scores_block"),
        *("stride_kept_row", "stride_kept_head", "stride_num_row", "stride_num_head"),
        "block_size",
    ],
    do_not_specialize_on_alignment=["kept_ptr", "num_kept_ptr"],  # a layer's part of a table
)
def _select_blocks_kernel(
    scores_ptr,
    gen_scores_ptr,
    lengths,
    first_gens,
    keep_all,
    keep_gen,
    kept_ptr,
    num_kept_ptr,
    rows_ptr,
    kept_width,
    stride_scores_head,
    stride_scores_block,
    stride_kept_row,
    stride_kept_head,
    stride_num_row,
    stride_num_head,
    block_size,
    WIDTH: tl.constexpr,
):
    """Program (query block, head)."""
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + block)
    num_key_blocks = tl.cdiv(tl.load(lengths + block), block_size)
    first_gen = tl.load(first_gens + block)
    ids = tl.arange(0, WIDTH)
    exists = ids < num_key_blocks
    scores_row = head * stride_scores_head + block * stride_scores_block + ids

    scores = tl.load(scores_ptr + scores_row, mask=exists, other=0.0)
    chosen = _best(scores, exists, tl.load(keep_all + block)) & (ids < first_gen)
    generated = exists & (ids >= first_gen)
    scores = tl.load(gen_scores_ptr + scores_row, mask=generated, other=0.0)
    chosen = chosen | _best(scores, generated, tl.load(keep_gen + block))

    count = tl.sum(chosen.to(tl.int32), 0)
    tl.store(num_kept_ptr + row * stride_num_row + head * stride_num_head, count)
    slots = tl.cumsum(chosen.to(tl.int32), 0) - 1
    kept_row = kept_ptr + row * stride_kept_row + head * stride_kept_head
    id_type = kept_ptr.dtype.element_ty
    tl.store(kept_row + slots, ids.to(id_type), mask=chosen)
    for first in tl.range(0, kept_width, WIDTH):
        unused = (first + ids >= count) & (first + ids < kept_width)
        tl.store(kept_row + first + ids, tl.full([WIDTH], -1, id_type), mask=unused)


@triton.jit
def _best(scores, eligible, count):
    """Where the `count` highest eligible scores are; of equal ones those of lower ids.

    Bits of floats >= 0 order as the floats do: the count-th highest is found bit by bit.
    """
    bits = tl.where(eligible, scores.to(tl.int32, bitcast=True), -1)
    lowest = 0
    for step in tl.range(0, 31):
        candidate = lowest | (1 << (30 - step))
        enough = tl.sum((bits >= candidate).to(tl.int32), 0) >= count
        lowest = tl.where(enough, candidate, lowest)
    above = bits > lowest
    ties = bits == lowest
    room = count - tl.sum(above.to(tl.int32), 0)
    return above | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= room))
