# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: block scores -> ascending lists of kept key blocks, on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.layout import PAGE, BatchLayout, BlockTables, Selection
from sparsed_vllm.kernels.tiles import (
    FIRST_GEN,
    KEEP_ALL,
    KEEP_GEN,
    KEY_LEN,
    column,
    find_row,
    find_tile,
)

WIDTHS = tuple(256 * 4**i for i in range(6))  # the last for four million tokens in blocks of 16


def select_blocks(
    scores: Tensor,
    gen_scores: Tensor,
    layout: BatchLayout,
    selection: Selection,
    tables: BlockTables,
) -> None:
    """See reference.select_blocks. Scores of real blocks are at least 0."""
    assert scores.stride() == gen_scores.stride() and scores.stride(2) == 1
    width = width_for(layout.max_key_blocks)
    if layout.num_tiles:
        _select_blocks_kernel[(layout.num_tiles, scores.shape[0])](
            scores,
            gen_scores,
            layout.columns,
            selection.counts,
            selection.mass,
            layout.num_seqs,
            layout.tile,
            layout.block_size,
            tables.kept,
            tables.num_kept,
            tables.pages,
            scores.stride(0),
            scores.stride(1),
            tables.kept.stride(0),
            tables.kept.stride(1),
            tables.kept.stride(2),
            tables.num_kept.stride(0),
            tables.num_kept.stride(1),
            tables.num_kept.stride(2),
            tables.pages.stride(0),
            WIDTH=width,
            num_warps=min(max(width // 256, 1), 8),
        )


def width_for(key_blocks: int) -> int:
    """Lanes of a program that selects from so many blocks: few sizes, as each is compiled."""
    return next(width for width in WIDTHS if width >= key_blocks)


def compile_up_to(
    max_key_blocks: int, ids: torch.dtype, device: torch.device | str, *, by_mass: bool = False
) -> None:
    """Compile what sequences of up to `max_key_blocks` need, before one of them comes.

    ids: the type of the tables
    """
    for width in WIDTHS[: WIDTHS.index(width_for(max_key_blocks)) + 1]:
        _select_in_vain(min(width, max_key_blocks), ids, device, by_mass)


def _select_in_vain(
    key_blocks: int, ids: torch.dtype, device: torch.device | str, by_mass: bool
) -> None:
    """A selection for one sequence of one block, beside scores of `key_blocks`."""
    layout = BatchLayout.of(
        PAGE,
        device,
        query_starts=[0, 0],
        num_rows=[1, 0],
        first_rows=[0, 0],
        key_starts=[0, 0],
        key_lens=[1, key_blocks * PAGE],
        page_rows=[0, 0],
    )
    selection = Selection.of(layout, [0, 0], [1.0, 1.0], [0.5, 0.5] if by_mass else [])
    scores, gen_scores = (torch.zeros(1, 1, key_blocks, device=device) for _ in range(2))
    kept = torch.empty(1, 1, 1, 1, dtype=ids, device=device)
    pages = torch.zeros(1, 1, dtype=torch.int32, device=device)
    select_blocks(scores, gen_scores, layout, selection, BlockTables(kept, kept[..., 0], pages))


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=[
        "num_seqs",
        "tile",
        "block_size",
        "stride_scores_head",
        "stride_scores_block",
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
        "counts",
        "mass_ptr",
        "kept_ptr",
        "num_kept_ptr",
        "pages_ptr",
    ],
)
def _select_blocks_kernel(
    scores_ptr,
    gen_scores_ptr,
    columns,
    counts,
    mass_ptr,
    num_seqs,
    tile,
    block_size,
    kept_ptr,
    num_kept_ptr,
    pages_ptr,
    stride_scores_head,
    stride_scores_block,
    stride_kept_page,
    stride_kept_row,
    stride_kept_head,
    stride_num_page,
    stride_num_row,
    stride_num_head,
    stride_pages,
    WIDTH: tl.constexpr,
):
    """Program (query block, head)."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence, index = find_tile(columns, num_seqs, block)
    page, row = find_row(pages_ptr, stride_pages, columns, num_seqs, sequence, index, tile)
    num_key_blocks = tl.cdiv(column(columns, num_seqs, KEY_LEN, sequence), block_size)
    first_gen = column(counts, num_seqs, FIRST_GEN, sequence)
    keep_all = column(counts, num_seqs, KEEP_ALL, sequence)
    keep_gen = column(counts, num_seqs, KEEP_GEN, sequence)
    ids = tl.arange(0, WIDTH)
    exists = ids < num_key_blocks
    scores_row = head * stride_scores_head + block.to(tl.int64) * stride_scores_block + ids

    scores = tl.load(scores_ptr + scores_row, mask=exists, other=0.0)
    chosen = _best(scores, exists, keep_all) & (ids < first_gen)
    generated = exists & (ids >= first_gen)
    gen_scores = tl.load(gen_scores_ptr + scores_row, mask=generated, other=0.0)
    chosen = chosen | _best(gen_scores, generated, keep_gen)
    if mass_ptr is not None:
        share = tl.load(mass_ptr + sequence)
        needed = _holding(scores, exists, share) | _holding(gen_scores, generated, share)
        chosen = chosen & needed

    count = tl.sum(chosen.to(tl.int32), 0)
    id_type = kept_ptr.dtype.element_ty
    num_kept = num_kept_ptr + page * stride_num_page + row * stride_num_row + head * stride_num_head
    tl.store(num_kept, count.to(id_type))
    slots = tl.cumsum(chosen.to(tl.int32), 0) - 1
    kept = kept_ptr + page * stride_kept_page + row * stride_kept_row + head * stride_kept_head
    tl.store(kept + slots, ids.to(id_type), mask=chosen)


@triton.jit
def _best(scores, eligible, count):
    """Where the `count` highest eligible scores are; of equal ones those of lower ids.

    The bits of floats >= 0, as integers, are ordered as the floats are: the count-th highest is
    found bit by bit.
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


@triton.jit
def _holding(scores, eligible, share):
    """Where the highest eligible scores are that hold `share` of the sum of all, and no more.

    Of equal ones those of lower ids. Found bit by bit, as in _best. Sums are in float64: in float32
    their order would decide.
    """
    bits = tl.where(eligible, scores.to(tl.int32, bitcast=True), -1)
    mass = tl.where(eligible, scores, 0.0).to(tl.float64)
    enough = share * tl.sum(mass, 0)
    lowest = 0
    for step in tl.range(0, 31):
        candidate = lowest | (1 << (30 - step))
        held = tl.sum(tl.where(bits >= candidate, mass, 0.0), 0)
        lowest = tl.where(_is_enough(held, enough), candidate, lowest)
    above = bits > lowest
    ties = bits == lowest
    each = tl.max(tl.where(ties, mass, 0.0), 0)
    num_before = tl.cumsum(ties.to(tl.int32), 0) - 1
    before = tl.sum(tl.where(above, mass, 0.0), 0) + num_before * each
    return above | (ties & (_is_enough(before, enough) == 0))


@triton.jit
def _is_enough(held, enough):
    """Of NaN and of nothing there is never enough."""
    return (held >= enough) & (held > 0)
