# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: which places a step reads, and what their rows need besides."""

import triton
import triton.language as tl

from sparsed_vllm.kernels.canvas import CanvasState, OpenRows, StepColumns
from sparsed_vllm.kernels.canvas_columns import (
    BLOCK_LENGTH,
    BLOCK_STEP,
    END,
    NUM_OPEN,
    NUM_TOKENS,
    READ_ROW,
    ROW_START,
    SLOT,
    WINDOW_ROW,
    first_masked,
    whole,
)
from sparsed_vllm.kernels.relaunch import relaunch

WIDTH = 256  # places that are looked at together


def open_canvases(state: CanvasState, columns: StepColumns) -> OpenRows:
    """See reference.open_canvases."""
    num_rows = columns.num_rows
    found = state.seeds.new_empty(len(OpenRows._fields), num_rows)
    if num_rows:
        relaunch(
            _open_canvases_kernel,
            (columns.num_reqs, 1, 1),
            found.device,
            columns.device,
            columns.num_reqs,
            state.masked,
            state.longest,
            state.seeds,
            state.block_steps,
            found,
            num_rows,
            WIDTH,
            num_warps=2,
        )
    return OpenRows(*found)


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=["num_reqs", "longest", "num_rows"],
    do_not_specialize_on_alignment=[
        "columns",
        "masked_ptr",
        "seeds_ptr",
        "block_steps_ptr",
        "found",
    ],
)
def _open_canvases_kernel(
    columns,
    num_reqs,
    masked_ptr,
    longest,
    seeds_ptr,
    block_steps_ptr,
    found,
    num_rows,
    WIDTH: tl.constexpr,
):
    """Program (request)."""
    req = tl.program_id(0)
    slot = whole(columns, num_reqs, SLOT, req).to(tl.int64)
    num_tokens = whole(columns, num_reqs, NUM_TOKENS, req)
    length = whole(columns, num_reqs, BLOCK_LENGTH, req)
    num_open = whole(columns, num_reqs, NUM_OPEN, req)
    read_row = whole(columns, num_reqs, READ_ROW, req)
    window_row = whole(columns, num_reqs, WINDOW_ROW, req)
    found += whole(columns, num_reqs, ROW_START, req)
    masked = masked_ptr + slot * longest
    lanes = tl.arange(0, WIDTH)

    start = first_masked(masked, 0, num_tokens, WIDTH) // length * length
    end = tl.minimum(start + length, tl.minimum(whole(columns, num_reqs, END, req), num_tokens))
    count = 0
    for first in range(start, end, WIDTH):
        places = first + lanes
        is_open = (tl.load(masked + places, mask=places < end, other=0) != 0).to(tl.int32)
        ranks = count + tl.cumsum(is_open, 0) - 1
        is_read = (is_open > 0) & (ranks < num_open)
        tl.store(found + ranks, places, mask=is_read)
        rows = tl.maximum(read_row + places, window_row)
        tl.store(found + 2 * num_rows + ranks, rows, mask=is_read)
        count += tl.sum(is_open, 0)

    seed = tl.load(seeds_ptr + slot)
    block_step = whole(columns, num_reqs, BLOCK_STEP, req).to(tl.int64)
    block_step = tl.where(block_step >= 0, block_step, tl.load(block_steps_ptr + slot))
    for first in range(0, num_open, WIDTH):
        ranks = first + lanes
        inside = ranks < num_open
        is_padding = inside & (ranks >= count)
        tl.store(found + ranks, -1, mask=is_padding)
        padding_row = tl.maximum(read_row - 1, window_row)
        tl.store(found + 2 * num_rows + ranks, padding_row, mask=is_padding)
        tl.store(found + num_rows + ranks, req, mask=inside)
        tl.store(found + 3 * num_rows + ranks, seed, mask=inside)
        tl.store(found + 4 * num_rows + ranks, block_step, mask=inside)
