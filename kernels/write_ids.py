# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: what the model is given of canvases, and of rows that are of any places."""

import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels import canvas
from sparsed_vllm.kernels.canvas import CanvasState, SequenceRows, StepColumns
from sparsed_vllm.kernels.canvas_columns import CANVAS_ROW, FIRST_PLACE, NUM_SEEN, SLOT, whole
from sparsed_vllm.kernels.relaunch import relaunch

WIDTH = 256  # places or rows of a program


def write_ids(
    state: CanvasState,
    columns: StepColumns,
    input_ids: Tensor,
    mask_token_id: int,
    light: SequenceRows | None,
) -> None:
    """See reference.write_ids. A row that both parts write gets the same from both."""
    num_canvas = columns.num_reqs * triton.cdiv(columns.most(canvas.NUM_SEEN), WIDTH)
    num_light = 0 if light is None else len(light.rows)
    of_light = (None,) * len(SequenceRows._fields) if light is None else light
    relaunch(
        _write_ids_kernel,
        (num_canvas + triton.cdiv(num_light, WIDTH), 1, 1),
        (input_ids.device, light is None),
        columns.device,
        columns.num_reqs,
        state.tokens,
        state.masked,
        state.longest,
        input_ids,
        mask_token_id,
        num_canvas,
        *of_light,
        0 if light is None else light.prompts.stride(0),
        num_light,
        light is not None,
        WIDTH,
        num_warps=2,
    )


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=[
        "num_reqs",
        "longest",
        "mask_token_id",
        "num_canvas",
        "stride_prompts",
        "num_light",
    ],
    do_not_specialize_on_alignment=[
        "columns",
        "tokens_ptr",
        "masked_ptr",
        "input_ids",
        "rows_ptr",
        "places_ptr",
        "seqs_ptr",
        "prompts_ptr",
        "prompt_lens_ptr",
        "positions_ptr",
    ],
)
def _write_ids_kernel(
    columns,
    num_reqs,
    tokens_ptr,
    masked_ptr,
    longest,
    input_ids,
    mask_token_id,
    num_canvas,
    rows_ptr,
    places_ptr,
    seqs_ptr,
    prompts_ptr,
    prompt_lens_ptr,
    positions_ptr,
    stride_prompts,
    num_light,
    HAS_LIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program (WIDTH places of a request's canvas), and behind those (WIDTH of the other rows)."""
    program = tl.program_id(0)
    if program < num_canvas:
        req = program % num_reqs
        first = program // num_reqs * WIDTH
        _write_canvas(
            columns,
            num_reqs,
            tokens_ptr,
            masked_ptr,
            longest,
            input_ids,
            mask_token_id,
            req,
            first,
            WIDTH,
        )
    elif HAS_LIGHT:
        numbers = (program - num_canvas) * WIDTH + tl.arange(0, WIDTH)
        inside = numbers < num_light
        rows = tl.load(rows_ptr + numbers, mask=inside, other=0)
        places = tl.load(places_ptr + numbers, mask=inside, other=0)
        seqs = tl.load(seqs_ptr + numbers, mask=inside, other=0)
        slots = whole(columns, num_reqs, SLOT, seqs).to(tl.int64)
        prompt_lens = tl.load(prompt_lens_ptr + slots).to(tl.int64)
        is_prompt = places < prompt_lens
        own = prompts_ptr + slots * stride_prompts + places
        prompt = tl.load(own, mask=inside & is_prompt, other=0)
        in_canvas = slots * longest + places - prompt_lens
        seen = _seen(
            tokens_ptr, masked_ptr, in_canvas, inside & (places >= prompt_lens), mask_token_id
        )
        tl.store(input_ids + rows, tl.where(is_prompt, prompt, seen), mask=inside)
        tl.store(positions_ptr + rows, places, mask=inside)


@triton.jit
def _write_canvas(
    columns,
    num_reqs,
    tokens_ptr,
    masked_ptr,
    longest,
    input_ids,
    mask_token_id,
    req,
    first,
    WIDTH: tl.constexpr,
):
    """WIDTH places of a request's canvas from `first` on."""
    slot = whole(columns, num_reqs, SLOT, req).to(tl.int64)
    places = first + tl.arange(0, WIDTH)
    inside = places < whole(columns, num_reqs, NUM_SEEN, req)
    inside &= places >= whole(columns, num_reqs, FIRST_PLACE, req)
    ids = _seen(tokens_ptr, masked_ptr, slot * longest + places, inside, mask_token_id)
    tl.store(input_ids + whole(columns, num_reqs, CANVAS_ROW, req) + places, ids, mask=inside)


@triton.jit
def _seen(tokens_ptr, masked_ptr, numbers, inside, mask_token_id):
    """The tokens that the model sees of places of canvases."""
    tokens = tl.load(tokens_ptr + numbers, mask=inside, other=0)
    is_masked = tl.load(masked_ptr + numbers, mask=inside, other=0) != 0
    return tl.where(is_masked, mask_token_id, tokens)
