# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: logits -> a token and a confidence for each row; no copy of the logits is written.

A program reduces one tile of a row, and a second kernel the tiles of each row: a step often reads
a few dozen rows only, and with a program a row most of the GPU would be idle. For top p and top k,
a program a row first searches the least logit that may be drawn: it reads the row, which stays in
the L2 cache, once for each bit of a logit.
"""

from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.choice import Choice, Confidence, Forbidden, Noise
from sparsed_vllm.kernels.noise import exponential
from sparsed_vllm.kernels.relaunch import relaunch
from sparsed_vllm.kernels.tiles import LOG2_E

TILE = 4096  # tokens of a program
ROW_TILE = 8192  # tokens that a search reads at once

CONFIDENCES = get_args(Confidence)
MARGIN, ENTROPY = tl.constexpr(1), tl.constexpr(2)  # places in it

EMPTY_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""How many of the last bits of a float32 hold nothing where a logit came from."""
LOWEST_KEY = tl.constexpr(-2139095041)  # of -inf

# What is noted of each tile: float32 [5, rows, tiles].
PEAK = tl.constexpr(0)  # the highest logit of the softmax whose confidence is asked
TOTAL = tl.constexpr(1)  # of exp(logit - PEAK)
CHOSEN = tl.constexpr(2)  # the chosen token's logit in it
LARGEST = tl.constexpr(3)  # of all logits as they are; NaN if one is
EXTRA = tl.constexpr(4)  # the second highest logit, or the sum of exp(logit - PEAK) (logit - PEAK)


def choose_tokens(
    logits: Tensor, choice: Choice, forbidden: Forbidden, noise: Noise | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.choose_tokens. The logits of a row lie side by side."""
    assert logits.stride(1) == 1
    num_rows, vocab = logits.shape
    tokens = logits.new_empty(num_rows, dtype=torch.int64)
    confidence, largest = logits.new_empty(2, num_rows, dtype=torch.float32)
    tiles = triton.cdiv(vocab, TILE)
    notes = logits.new_empty(5, num_rows, tiles, dtype=torch.float32)
    scores = logits.new_empty(num_rows, tiles, dtype=torch.float64)
    ids = logits.new_empty(num_rows, tiles, dtype=torch.int32)
    confidence_kind = CONFIDENCES.index(choice.confidence)
    stops = forbidden.stop_tokens
    if num_rows:
        shape = (logits.dtype, logits.stride(0), vocab, logits.data_ptr() % 16)
        kinds = (choice.tempered, choice.truncates, confidence_kind)
        given = (stops is None, forbidden.early is None, noise is None)
        relaunch(
            _note_tiles_kernel,
            (num_rows * tiles, 1, 1),
            (logits.device, *shape, *kinds, *given),
            logits,
            logits.stride(0),
            vocab,
            forbidden.mask_token_id,
            stops,
            0 if stops is None else len(stops),
            forbidden.early,
            float(choice.temperature),
            None if noise is None else noise.seeds,
            None if noise is None else noise.places,
            None if noise is None else noise.steps,
            _least_keys(logits, choice, forbidden) if choice.truncates else None,
            notes,
            scores,
            ids,
            num_rows,
            tiles,
            noise is not None,
            choice.tempered,
            choice.truncates,
            confidence_kind,
            forbidden.early is not None,
            EMPTY_BITS[logits.dtype],
            TILE,
            num_warps=8,
        )
        relaunch(
            _add_up_kernel,
            (num_rows, 1, 1),
            (logits.device, tiles, confidence_kind),
            notes,
            scores,
            ids,
            num_rows,
            tiles,
            tokens,
            confidence,
            largest,
            confidence_kind,
            triton.next_power_of_2(tiles),
            num_warps=1,
        )
    return tokens, confidence, largest


def _least_keys(logits: Tensor, choice: Choice, forbidden: Forbidden) -> Tensor:
    """Of each row the key of the least logit that may be drawn; int32 [rows]"""
    num_rows, vocab = logits.shape
    least = logits.new_empty(num_rows, dtype=torch.int32)
    stops = forbidden.stop_tokens
    _least_keys_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        vocab,
        forbidden.mask_token_id,
        stops,
        0 if stops is None else len(stops),
        forbidden.early,
        choice.temperature,
        choice.top_p,
        choice.top_k or vocab,
        least,
        EARLY=forbidden.early is not None,
        EMPTY_BITS=EMPTY_BITS[logits.dtype],
        TILE=min(ROW_TILE, triton.next_power_of_2(vocab)),
        num_warps=16,
    )
    return least


@triton.jit
def _load(logits_ptr, stride_row, vocab, row, ids):
    """Logits of a row in float32, -inf past its end."""
    row_ptr = logits_ptr + row.to(tl.int64) * stride_row
    return tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def _bar(x, ids, row, mask_token_id, stops_ptr, num_stops, early_ptr, EARLY: tl.constexpr):
    """Logits with forbidden tokens, and what is not a number, out of reach."""
    barred = (ids == mask_token_id) | (x != x)
    if EARLY:
        is_early = tl.load(early_ptr + row) != 0
        for place in range(num_stops):
            barred = barred | (is_early & (ids == tl.load(stops_ptr + place)))
    return tl.where(barred, float("-inf"), x)


@triton.jit
def _key(x, EMPTY_BITS: tl.constexpr):
    """Integers that are ordered as the floats are."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # one zero, not two
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> EMPTY_BITS


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(do_not_specialize=["mask_token_id", "num_stops", "top_k"])
def _least_keys_kernel(
    logits_ptr,
    stride_row,
    vocab,
    mask_token_id,
    stops_ptr,
    num_stops,
    early_ptr,
    temperature,
    top_p,
    top_k,
    least_ptr,
    EARLY: tl.constexpr,
    EMPTY_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (row): the least key with at most top_p of the mass and fewer than top_k above it.

    Every sum is over the same lanes in the same order: rounded too, the mass above a higher key is
    no larger, as the search needs.
    """
    row = tl.program_id(0)
    lanes = tl.arange(0, TILE)
    peaks = tl.full([TILE], float("-inf"), tl.float32)
    for first in range(0, vocab, TILE):
        x = _load(logits_ptr, stride_row, vocab, row, first + lanes)
        x = _bar(x, first + lanes, row, mask_token_id, stops_ptr, num_stops, early_ptr, EARLY)
        peaks = tl.maximum(peaks, x)
    peak = tl.max(peaks, 0)
    scale = LOG2_E / temperature
    low = tl.full([], LOWEST_KEY >> EMPTY_BITS, tl.int64)
    high = _key(peak, EMPTY_BITS).to(tl.int64)
    middle = low - 1  # first the sum of all
    room = tl.full([], 0.0, tl.float32)
    while middle < high:
        masses = tl.zeros([TILE], tl.float32)
        counts = tl.zeros([TILE], tl.int32)
        for first in range(0, vocab, TILE):
            x = _load(logits_ptr, stride_row, vocab, row, first + lanes)
            x = _bar(x, first + lanes, row, mask_token_id, stops_ptr, num_stops, early_ptr, EARLY)
            above = _key(x, EMPTY_BITS) > middle
            masses += tl.where(above, tl.exp2((x - peak) * scale), 0.0)
            counts += above.to(tl.int32)
        mass = tl.sum(masses, 0)
        if middle < low:
            room = top_p * mass
        else:
            fits = (mass <= room) & (tl.sum(counts, 0) < top_k)
            high = tl.where(fits, middle, high)
            low = tl.where(fits, low, middle + 1)
        middle = (low + high) >> 1
    tl.store(least_ptr + row, high.to(tl.int32))


@triton.jit(
    do_not_specialize=["mask_token_id", "num_stops", "num_rows"],
    do_not_specialize_on_alignment=[
        "stops_ptr",
        "early_ptr",
        "seeds_ptr",
        "places_ptr",
        "steps_ptr",
    ],
)
def _note_tiles_kernel(
    logits_ptr,
    stride_row,
    vocab,
    mask_token_id,
    stops_ptr,
    num_stops,
    early_ptr,
    temperature,
    seeds_ptr,
    places_ptr,
    steps_ptr,
    least_ptr,
    notes_ptr,
    scores_ptr,
    ids_ptr,
    num_rows,
    tiles,
    DRAWN: tl.constexpr,
    TEMPERED: tl.constexpr,
    TRUNCATED: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    EARLY: tl.constexpr,
    EMPTY_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (row and tile): its best token, and its part of the softmax."""
    row = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * TILE
    ids = first + tl.arange(0, TILE)
    x = _load(logits_ptr, stride_row, vocab, row, ids)
    allowed = _bar(x, ids, row, mask_token_id, stops_ptr, num_stops, early_ptr, EARLY)
    if TRUNCATED:
        kept = _key(allowed, EMPTY_BITS) >= tl.load(least_ptr + row)
        allowed = tl.where(kept, allowed, float("-inf"))

    score = allowed.to(tl.float64)
    if DRAWN:
        seed = tl.load(seeds_ptr + row)
        canvas_place = tl.load(places_ptr + row)
        step = tl.load(steps_ptr + row)
        pairs = first // 2 + tl.arange(0, TILE // 2)
        gumbel = -tl.log(exponential(seed, canvas_place, step, pairs))
        score += temperature * gumbel.to(tl.float64)
    best = tl.max(score, 0)
    chosen = tl.min(tl.where(score == best, ids, vocab), 0)

    has_nan = tl.max((x != x).to(tl.int32), 0) > 0
    x = tl.where(x == x, x, float("-inf"))
    largest = tl.where(has_nan, float("nan"), tl.max(x, 0))
    if TEMPERED:
        x = tl.div_rn(allowed, tl.zeros_like(allowed) + temperature)
    peak = tl.max(x, 0)
    x_chosen = tl.max(tl.where(ids == chosen, x, float("-inf")), 0)
    weights = tl.exp(x - tl.where(peak == float("-inf"), 0.0, peak))

    place = tl.program_id(0)
    size = num_rows.to(tl.int64) * tiles
    tl.store(scores_ptr + place, best)
    tl.store(ids_ptr + place, chosen)
    tl.store(notes_ptr + PEAK * size + place, peak)
    tl.store(notes_ptr + TOTAL * size + place, tl.sum(weights, 0))
    tl.store(notes_ptr + CHOSEN * size + place, x_chosen)
    tl.store(notes_ptr + LARGEST * size + place, largest)
    if CONFIDENCE == MARGIN:
        top = tl.min(tl.where(x == peak, ids, vocab), 0)
        second = tl.max(tl.where(ids == top, float("-inf"), x), 0)
        tl.store(notes_ptr + EXTRA * size + place, second)
    if CONFIDENCE == ENTROPY:
        slope = tl.sum(weights * tl.where(weights > 0, x - peak, 0.0), 0)
        tl.store(notes_ptr + EXTRA * size + place, slope)


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["confidence_ptr", "largest_ptr"],
)
def _add_up_kernel(
    notes_ptr,
    scores_ptr,
    ids_ptr,
    num_rows,
    tiles,
    tokens_ptr,
    confidence_ptr,
    largest_ptr,
    CONFIDENCE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Program (row): all its tiles; of equal scores the first wins."""
    row = tl.program_id(0)
    lanes = tl.arange(0, TILES)
    inside = lanes < tiles
    places = row * tiles + lanes
    size = num_rows.to(tl.int64) * tiles
    lowest = float("-inf")

    scores = tl.load(scores_ptr + places, mask=inside, other=lowest)
    winner = tl.min(tl.where(inside & (scores == tl.max(scores, 0)), lanes, TILES), 0)
    tl.store(tokens_ptr + row, tl.load(ids_ptr + row * tiles + winner).to(tl.int64))
    largest = tl.load(notes_ptr + LARGEST * size + places, mask=inside, other=lowest)
    has_nan = tl.max((largest != largest).to(tl.int32), 0) > 0
    largest = tl.where(largest == largest, largest, lowest)
    tl.store(largest_ptr + row, tl.where(has_nan, float("nan"), tl.max(largest, 0)))

    # Float64 costs nothing for so few numbers: only the notes are rounded.
    peaks = tl.load(notes_ptr + PEAK * size + places, mask=inside, other=lowest).to(tl.float64)
    totals = tl.load(notes_ptr + TOTAL * size + places, mask=inside, other=0.0).to(tl.float64)
    peak = tl.max(peaks, 0)
    weights = tl.exp(peaks - peak)
    total = tl.sum(totals * weights, 0)
    if CONFIDENCE == MARGIN:
        seconds = tl.load(notes_ptr + EXTRA * size + places, mask=inside, other=lowest)
        top = tl.min(tl.where(peaks == peak, lanes, TILES), 0)
        others = tl.where(lanes == top, lowest, peaks)
        second = tl.max(tl.maximum(seconds.to(tl.float64), others), 0)
        confidence = (1 - tl.exp(second - peak)) / total
    elif CONFIDENCE == ENTROPY:
        slopes = tl.load(notes_ptr + EXTRA * size + places, mask=inside, other=0.0)
        below = tl.where(weights > 0, peaks - peak, 0.0)
        slope = tl.sum(weights * (slopes + totals * below), 0)
        confidence = slope / total - tl.log(total)
    else:
        chosen = tl.load(notes_ptr + CHOSEN * size + row * tiles + winner)
        confidence = tl.exp(chosen.to(tl.float64) - peak) / total
    tl.store(confidence_ptr + row, confidence.to(tl.float32))
