# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: the noise of a draw, from a counter of (number, place, step) and a request's seed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.choice import STREAM, Noise

TOKEN_STREAM = tl.constexpr(STREAM)
ROW_STREAM = tl.constexpr(STREAM + 1)
ROWS = 128  # of a program


def draw_uniform(noise: Noise) -> Tensor:
    """See reference.draw_uniform."""
    num_rows = noise.seeds.shape[0]
    uniform = noise.seeds.new_empty(num_rows, dtype=torch.float64)
    if num_rows:
        _draw_uniform_kernel[(triton.cdiv(num_rows, ROWS),)](
            noise.seeds,
            noise.places,
            noise.steps,
            uniform,
            num_rows,
            ROWS=ROWS,
            num_warps=4,
        )
    return uniform


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["seeds_ptr", "places_ptr", "steps_ptr"],
)
def _draw_uniform_kernel(
    seeds_ptr,
    places_ptr,
    steps_ptr,
    uniform_ptr,
    num_rows,
    ROWS: tl.constexpr,
):
    """Program (ROWS rows)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    seed = tl.load(seeds_ptr + rows, mask=inside, other=0)
    place = tl.load(places_ptr + rows, mask=inside, other=0)
    step = tl.load(steps_ptr + rows, mask=inside, other=0)
    high, low, _, _ = random_words(seed, rows * 0, place, step, ROW_STREAM)
    tl.store(uniform_ptr + rows, uniform(high, low), mask=inside)


@triton.jit
def random_words(seed, numbers, place, step, STREAM: tl.constexpr):
    """Four words of 32 bits for each of `numbers`; the rest broadcasts to them."""
    numbers = numbers.to(tl.uint32)
    zeros = numbers * 0
    place = zeros + place.to(tl.uint32)
    step = zeros + step.to(tl.uint32)
    return tl.philox(seed, numbers, place, step, zeros + STREAM)


@triton.jit
def uniform(high, low):
    """64 random bits as a float64 in (0, 1)."""
    bits = high.to(tl.float64) * 4294967296.0 + (low.to(tl.float64) + 0.5)
    # Typed, as tl.minimum would take a bare number as a float32, and that is 1.0.
    largest = tl.full(bits.shape, 1 - 1.1102230246251565e-16, tl.float64)
    return tl.minimum(bits * 5.421010862427522e-20, largest)


@triton.jit
def exponential(seed, place, step, pairs):
    """See reference.exponential: for tokens 2 * pairs and 2 * pairs + 1, interleaved."""
    a, b, c, d = random_words(seed, pairs, place, step, TOKEN_STREAM)
    return tl.interleave(_exponential(a, b), _exponential(c, d))


@triton.jit
def _exponential(high, low):
    v = tl.minimum(share(high, low), 1 - 5.9604644775390625e-8)
    # 1 - v rounds a small v's bits away, and log(1 - v) with them: there a series stands for it,
    # whose rest is below 2**-27 of it.
    series = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5 + v * (1 / 6))))))
    return tl.where(v < 0.0625, series, -tl.log(1 - v))


@triton.jit
def share(high, low):
    """64 random bits as a float32 in (0, 1]."""
    fraction = (low.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return (high.to(tl.float32) + fraction) * 2.3283064365386963e-10
