# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: the tokens that became final."""

import triton
import triton.language as tl

from sparsed_vllm.kernels.canvas import CanvasState, SequenceEnds, StepColumns, Taken
from sparsed_vllm.kernels.canvas_columns import (
    BLOCK_LENGTH,
    EARLY_STOP,
    IS_LAST,
    MAY_HAND_OUT,
    NUM_TOKENS,
    SLOT,
    first_masked,
    whole,
)
from sparsed_vllm.kernels.relaunch import relaunch

WIDTH = 256  # places that are looked at together


def take_canvases(state: CanvasState, columns: StepColumns, ends: SequenceEnds | None) -> Taken:
    """See reference.take_canvases."""
    num_reqs, width = columns.num_reqs, columns.width
    tokens, places = state.num_taken.new_empty(2, num_reqs, width)
    counts, has_failed = state.tokens.new_empty(2, num_reqs)
    relaunch(
        _take_canvases_kernel,
        (num_reqs, 1, 1),
        (tokens.device, ends is None),
        columns.device,
        num_reqs,
        state.tokens,
        state.masked,
        state.longest,
        state.num_taken,
        state.has_failed,
        None if ends is None else ends.prompt_lens,
        None if ends is None else ends.ends,
        tokens,
        places,
        width,
        counts,
        has_failed,
        ends is not None,
        WIDTH,
        num_warps=2,
    )
    return Taken(tokens, places, counts, has_failed)


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=["num_reqs", "longest", "width"],
    do_not_specialize_on_alignment=[
        "columns",
        "tokens_ptr",
        "masked_ptr",
        "num_taken_ptr",
        "has_failed_ptr",
        "prompt_lens_ptr",
        "ends_ptr",
        "out_tokens",
        "out_places",
        "out_counts",
        "out_failed",
    ],
)
def _take_canvases_kernel(
    columns,
    num_reqs,
    tokens_ptr,
    masked_ptr,
    longest,
    num_taken_ptr,
    has_failed_ptr,
    prompt_lens_ptr,
    ends_ptr,
    out_tokens,
    out_places,
    width,
    out_counts,
    out_failed,
    HAS_ENDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (request)."""
    req = tl.program_id(0)
    slot = whole(columns, num_reqs, SLOT, req).to(tl.int64)
    num_tokens = whole(columns, num_reqs, NUM_TOKENS, req)
    length = whole(columns, num_reqs, BLOCK_LENGTH, req)
    taken = tl.load(num_taken_ptr + slot).to(tl.int32)

    first = first_masked(masked_ptr + slot * longest, 0, num_tokens, WIDTH)
    final = tl.where(first < num_tokens, first // length * length, num_tokens)
    is_whole = whole(columns, num_reqs, EARLY_STOP, req) == 0
    final = tl.where(is_whole, final // num_tokens * num_tokens, final)
    final = tl.where(whole(columns, num_reqs, IS_LAST, req) > 0, num_tokens, final)
    final = tl.where(whole(columns, num_reqs, MAY_HAND_OUT, req) > 0, final, taken)
    final = tl.maximum(final, taken)

    tl.store(num_taken_ptr + slot, final)
    tl.store(out_counts + req, final - taken)
    tl.store(out_failed + req, tl.load(has_failed_ptr + slot).to(tl.int32))
    if HAS_ENDS:
        tl.store(ends_ptr + slot, tl.load(prompt_lens_ptr + slot) + taken)
    for start in range(0, width, WIDTH):
        columns_out = start + tl.arange(0, WIDTH)
        inside = columns_out < width
        places = tl.minimum(taken + columns_out, num_tokens - 1)
        tokens = tl.load(tokens_ptr + slot * longest + places, mask=inside, other=0)
        out = req.to(tl.int64) * width + columns_out
        tl.store(out_tokens + out, tokens, mask=inside)
        tl.store(out_places + out, places, mask=inside)
