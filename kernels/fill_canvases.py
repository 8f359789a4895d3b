# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: which of the places that a step reads it fills, and what that does to their canvases.

A row's rank is counted, not sorted for: a request reads a block's places, a hundred or so, and a
program of eight warps compares all pairs of a thousand in some 15 us.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.canvas import CanvasState, OpenRows, StepColumns
from sparsed_vllm.kernels.canvas_columns import (
    ALG_TEMP,
    BLOCK_LENGTH,
    BY_CHANCE,
    NUM_FILLED,
    NUM_OPEN,
    NUM_TOKENS,
    ROW_START,
    SHARE,
    SLOT,
    THRESHOLD,
    first_masked,
    real,
    whole,
)
from sparsed_vllm.kernels.relaunch import relaunch

ROWS = 64  # of a request that are ranked together, against as many
WIDTH = 256  # places that are looked at together

HIGHEST = tl.constexpr((1 << 63) - 1)  # of a NaN
NOTHING = tl.constexpr(1 - (1 << 63))  # of what is no row; below that of -inf


def fill_canvases(
    state: CanvasState,
    columns: StepColumns,
    rows: OpenRows,
    tokens: Tensor,
    confidence: Tensor,
    largest: Tensor,
    uniform: Tensor | None,
) -> Tensor:
    """See reference.fill_canvases."""
    chosen = torch.empty_like(confidence, dtype=torch.bool)
    relaunch(
        _fill_canvases_kernel,
        (columns.num_reqs, 1, 1),
        (chosen.device, uniform is None),
        columns.device,
        columns.num_reqs,
        state.tokens,
        state.masked,
        state.longest,
        state.num_taken,
        state.block_steps,
        state.has_failed,
        rows.places,
        tokens,
        confidence,
        largest,
        uniform,
        chosen,
        uniform is not None,
        ROWS,
        WIDTH,
        num_warps=8,
    )
    return chosen


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=["num_reqs", "longest"],
    do_not_specialize_on_alignment=[
        "columns",
        "tokens_ptr",
        "masked_ptr",
        "num_taken_ptr",
        "block_steps_ptr",
        "has_failed_ptr",
        "places_ptr",
        "new_ptr",
        "confidence_ptr",
        "largest_ptr",
        "uniform_ptr",
        "chosen_ptr",
    ],
)
def _fill_canvases_kernel(
    columns,
    num_reqs,
    tokens_ptr,
    masked_ptr,
    longest,
    num_taken_ptr,
    block_steps_ptr,
    has_failed_ptr,
    places_ptr,
    new_ptr,
    confidence_ptr,
    largest_ptr,
    uniform_ptr,
    chosen_ptr,
    DRAWN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (request)."""
    req = tl.program_id(0)
    slot = whole(columns, num_reqs, SLOT, req).to(tl.int64)
    num_tokens = whole(columns, num_reqs, NUM_TOKENS, req)
    length = whole(columns, num_reqs, BLOCK_LENGTH, req)
    num_open = whole(columns, num_reqs, NUM_OPEN, req)
    row_start = whole(columns, num_reqs, ROW_START, req)
    num_filled = whole(columns, num_reqs, NUM_FILLED, req)
    threshold = real(columns, num_reqs, THRESHOLD, req).to(tl.float32)
    alg_temp = real(columns, num_reqs, ALG_TEMP, req)
    by_chance = whole(columns, num_reqs, BY_CHANCE, req)
    share = real(columns, num_reqs, SHARE, req)
    num_taken = tl.load(num_taken_ptr + slot)
    masked = masked_ptr + slot * longest
    canvas = tokens_ptr + slot * longest
    lanes = tl.arange(0, ROWS)
    places_ptr += row_start
    confidence_ptr += row_start
    if DRAWN:
        uniform_ptr += row_start

    # All of this is read before anything is filled, as no thread sees what another one writes.
    first = first_masked(masked, 0, num_tokens, WIDTH)
    start = first // length * length
    end = tl.minimum(start + length, num_tokens)
    num_masked = _count(masked, start, end, WIDTH)
    is_rest_filled = first_masked(masked, end, num_tokens, WIDTH) == num_tokens

    num_bad = 0
    for start_row in range(0, num_open, ROWS):
        ranks = start_row + lanes
        inside = ranks < num_open
        places = tl.load(places_ptr + ranks, mask=inside, other=-1)
        confidence = tl.load(confidence_ptr + ranks, mask=inside, other=0.0)
        keys = _keys(
            places_ptr, confidence_ptr, uniform_ptr, ranks, num_open, by_chance, alg_temp, DRAWN
        )
        num_ahead = tl.zeros([ROWS], tl.int32)
        for other_row in range(0, num_open, ROWS):
            others = other_row + lanes
            theirs = _keys(
                places_ptr,
                confidence_ptr,
                uniform_ptr,
                others,
                num_open,
                by_chance,
                alg_temp,
                DRAWN,
            )[None, :]
            # Of equal scores the first row comes first.
            ahead = (theirs > keys[:, None]) | (
                (theirs == keys[:, None]) & (others[None, :] < ranks[:, None])
            )
            num_ahead += tl.sum(ahead.to(tl.int32), 1)
        chosen = (num_ahead < num_filled) | (confidence >= threshold)
        if DRAWN:
            uniform = tl.load(uniform_ptr + ranks, mask=inside, other=1.0)
            chosen |= uniform < share
        chosen &= places >= 0
        tl.store(chosen_ptr + row_start + ranks, chosen, mask=inside)
        new = tl.load(new_ptr + row_start + ranks, mask=inside, other=0)
        # A place handed out before takes its own token again.
        tl.store(canvas + places, new.to(tl.int32), mask=chosen & (places >= num_taken))
        tl.store(masked + places, places < 0, mask=chosen)
        num_masked -= tl.sum(chosen.to(tl.int32), 0)
        largest = tl.load(largest_ptr + row_start + ranks, mask=inside, other=0.0)
        is_number = tl.abs(largest) < float("inf")
        num_bad += tl.sum((~is_number).to(tl.int32), 0)

    if num_bad > 0:
        tl.store(has_failed_ptr + slot, True)
    # A canvas that is filled is at its block 0.
    ran_on = (num_masked > 0) | (is_rest_filled & ((start == 0) | (first == num_tokens)))
    block_steps = tl.load(block_steps_ptr + slot)
    tl.store(block_steps_ptr + slot, tl.where(ran_on, block_steps + 1, 0))


@triton.jit
def _count(masked, start, end, WIDTH: tl.constexpr):
    """How many places of [start, end) are masked."""
    counts = tl.zeros([WIDTH], tl.int32)
    for first in range(start, end, WIDTH):
        places = first + tl.arange(0, WIDTH)
        is_masked = tl.load(masked + places, mask=places < end, other=0) != 0
        counts += is_masked.to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def _keys(
    places_ptr,
    confidence_ptr,
    uniform_ptr,
    ranks,
    num_open,
    by_chance,
    alg_temp,
    DRAWN: tl.constexpr,
):
    """Numbers that are ordered as the scores of rows are, a NaN the highest; int64."""
    inside = ranks < num_open
    places = tl.load(places_ptr + ranks, mask=inside, other=-1)
    scores = tl.load(confidence_ptr + ranks, mask=inside, other=0.0).to(tl.float64)
    if DRAWN:
        uniform = tl.load(uniform_ptr + ranks, mask=inside, other=0.5)
        scores = tl.where(by_chance > 0, uniform, scores)
        if alg_temp > 0:
            scores = scores / alg_temp - tl.log(-tl.log(uniform))
    # Adding 0 turns -0, which equals 0 but has other bits, into it.
    bits = (tl.where(places >= 0, scores, float("-inf")) + 0.0).to(tl.int64, bitcast=True)
    keys = tl.where(bits < 0, bits ^ HIGHEST, bits)
    keys = tl.where((scores != scores) & (places >= 0), HIGHEST, keys)
    return tl.where(inside, keys, NOTHING)
