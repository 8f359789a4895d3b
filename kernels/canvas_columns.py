# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the Triton kernels of canvases share: a request's numbers, and its first masked place."""

import triton
import triton.language as tl

from sparsed_vllm.kernels import canvas

SLOT = tl.constexpr(canvas.SLOT)
NUM_TOKENS = tl.constexpr(canvas.NUM_TOKENS)
NUM_SEEN = tl.constexpr(canvas.NUM_SEEN)
BLOCK_LENGTH = tl.constexpr(canvas.BLOCK_LENGTH)
END = tl.constexpr(canvas.END)
BLOCK_STEP = tl.constexpr(canvas.BLOCK_STEP)
NUM_OPEN = tl.constexpr(canvas.NUM_OPEN)
ROW_START = tl.constexpr(canvas.ROW_START)
NUM_FILLED = tl.constexpr(canvas.NUM_FILLED)
THRESHOLD = tl.constexpr(canvas.THRESHOLD)
SHARE = tl.constexpr(canvas.SHARE)
ALG_TEMP = tl.constexpr(canvas.ALG_TEMP)
BY_CHANCE = tl.constexpr(canvas.BY_CHANCE)
MAY_HAND_OUT = tl.constexpr(canvas.MAY_HAND_OUT)
EARLY_STOP = tl.constexpr(canvas.EARLY_STOP)
IS_LAST = tl.constexpr(canvas.IS_LAST)
FIRST_PLACE = tl.constexpr(canvas.FIRST_PLACE)
CANVAS_ROW = tl.constexpr(canvas.CANVAS_ROW)
READ_ROW = tl.constexpr(canvas.READ_ROW)
WINDOW_ROW = tl.constexpr(canvas.WINDOW_ROW)


@triton.jit
def real(columns, num_reqs, COLUMN: tl.constexpr, req):
    """A number of a request."""
    return tl.load(columns + COLUMN * num_reqs + req)


@triton.jit
def whole(columns, num_reqs, COLUMN: tl.constexpr, req):
    """A whole number of a request, or of several."""
    return tl.load(columns + COLUMN * num_reqs + req).to(tl.int32)


@triton.jit
def first_masked(masked, start, end, WIDTH: tl.constexpr):
    """The first masked place of a canvas from `start` on; `end` if none before it is."""
    found = tl.zeros([WIDTH], tl.int32) + end
    for first in range(start, end, WIDTH):
        places = first + tl.arange(0, WIDTH)
        is_masked = tl.load(masked + places, mask=places < end, other=0) != 0
        found = tl.minimum(found, tl.where(is_masked, places, end))
    return tl.min(found, 0)
