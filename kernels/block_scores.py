# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: how much softmax mass each query block puts on each key block."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels import reference
from sparsed_vllm.kernels.layout import BatchLayout, Selection
from sparsed_vllm.kernels.tiles import (
    FIRST_GEN,
    KEY_LEN,
    KEY_START,
    LOG2_E,
    LOWEST,
    QUERY_START,
    column,
    find_tile,
    head_options,
    load_rows,
)


def block_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    layout: BatchLayout,
    selection: Selection,
    *,
    scale: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See reference.block_scores."""
    assert scale > 0, "the maximum is taken before scaling"
    if q.is_cuda and q.dtype == torch.float32:
        # Without tensor cores the tiles are held in registers, and outgrow them.
        return reference.block_scores(q, k, lse, layout, selection, scale=scale, out=out)
    scores, gen_scores = out or reference.empty_scores(q, layout)
    assert scores.stride() == gen_scores.stride() and scores.stride(2) == 1
    scores.fill_(float("-inf"))
    gen_scores.fill_(float("-inf"))
    _launch(q, k, lse, layout, selection, scores, gen_scores, scale, with_prompt=True)
    return scores, gen_scores


def score_generation(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    layout: BatchLayout,
    selection: Selection,
    scores: Tensor,
    gen_scores: Tensor,
    scale: float,
) -> None:
    """What is left of block_scores when the prompts' blocks have been scored."""
    _launch(q, k, lse, layout, selection, scores, gen_scores, scale, with_prompt=False)


def _launch(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    layout: BatchLayout,
    selection: Selection,
    scores: Tensor,
    gen_scores: Tensor,
    scale: float,
    *,
    with_prompt: bool,
) -> None:
    if layout.num_tiles:
        _block_scores_kernel[(layout.num_tiles, q.shape[1])](
            q,
            k,
            lse,
            scores,
            gen_scores,
            layout.columns,
            selection.counts,
            layout.num_seqs,
            scale * LOG2_E.value,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            0 if lse is None else lse.stride(0),
            scores.stride(0),
            scores.stride(1),
            GROUP=q.shape[1] // k.shape[1],
            TILE=layout.tile,
            BLOCK=layout.block_size,
            HAS_LSE=lse is not None,
            WITH_PROMPT=with_prompt,
            **head_options(q),
            **_options(layout, q),
        )


def _options(layout: BatchLayout, q: Tensor) -> dict[str, int]:
    """KEYS: key places of a step, whole blocks of them."""
    options = {
        "KEYS": max(layout.block_size, 128 if q.shape[2] <= 128 else 32),
        "num_warps": 8 if layout.tile == 128 else 4,
        "num_stages": 2,
    }
    if layout.tile == q.shape[2] == 128 and _is_hopper(q.device):
        options["maxnreg"] = 128  # two programs then share a multiprocessor, and nothing spills
    return options


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=[
        "num_seqs",
        "stride_lse_head",
        "stride_scores_head",
        "stride_scores_block",
    ],
    do_not_specialize_on_alignment=["lse_ptr", "columns", "counts"],
)
def _block_scores_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    scores_ptr,
    gen_scores_ptr,
    columns,
    counts,
    num_seqs,
    scale_log2,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_lse_head,
    stride_scores_head,
    stride_scores_block,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_LSE: tl.constexpr,
    WITH_PROMPT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (query block, head)."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence, index = find_tile(columns, num_seqs, block)
    query_start = column(columns, num_seqs, QUERY_START, sequence).to(tl.int64)
    key_start = column(columns, num_seqs, KEY_START, sequence).to(tl.int64)
    length = column(columns, num_seqs, KEY_LEN, sequence)
    first = column(counts, num_seqs, FIRST_GEN, sequence) * BLOCK
    rows = index * TILE + tl.arange(0, TILE)
    q_base = q_ptr + query_start * stride_q_row + head * stride_q_head
    k_base = k_ptr + key_start * stride_k_row + head // GROUP * stride_k_head
    scores_row = head * stride_scores_head + block.to(tl.int64) * stride_scores_block
    scores = scores_ptr + scores_row
    gen_scores = gen_scores_ptr + scores_row

    q = load_rows(q_base, 0, rows, length, stride_q_row, HEAD_DIM, DIM, True)
    total = tl.zeros([TILE], tl.float32)
    peak = tl.full([TILE], LOWEST, tl.float32)
    for at in tl.range(first, length, KEYS):
        logits = _logits(q, k_base, at, length, stride_k_row, HEAD_DIM, DIM, KEYS, True)
        total, peak = _add(total, peak, logits, scale_log2)
    gen_lse = peak + tl.log2(total)
    if HAS_LSE:
        lse = lse_ptr + head * stride_lse_head + query_start + rows
        lse = tl.load(lse, mask=rows < length) * LOG2_E
    else:
        for at in tl.range(0, first, KEYS):
            logits = _logits(q, k_base, at, first, stride_k_row, HEAD_DIM, DIM, KEYS, True)
            total, peak = _add(total, peak, logits, scale_log2)
        lse = peak + tl.log2(total)
    # Rows past the end have no mass: exp2(logit - inf) is 0.
    lse = tl.where(rows < length, lse, float("inf"))
    gen_lse = tl.where(rows < length, gen_lse, float("inf"))

    if WITH_PROMPT:
        whole = first // KEYS * KEYS
        for at in tl.range(0, whole, KEYS):
            logits = _logits(q, k_base, at, first, stride_k_row, HEAD_DIM, DIM, KEYS, False)
            _store_means(scores, logits, lse, at, first, scale_log2, TILE, BLOCK, KEYS)
        if whole < first:
            logits = _logits(q, k_base, whole, first, stride_k_row, HEAD_DIM, DIM, KEYS, True)
            _store_means(scores, logits, lse, whole, first, scale_log2, TILE, BLOCK, KEYS)
    for at in tl.range(first, length, KEYS):
        logits = _logits(q, k_base, at, length, stride_k_row, HEAD_DIM, DIM, KEYS, True)
        _store_means(scores, logits, lse, at, length, scale_log2, TILE, BLOCK, KEYS)
        _store_means(gen_scores, logits, gen_lse, at, length, scale_log2, TILE, BLOCK, KEYS)

    mass = tl.minimum(length - index * TILE, TILE) * (1.0 / (TILE * BLOCK))
    tl.debug_barrier()  # each thread reads below what others wrote above
    _scale_to(scores, mass, 0, tl.cdiv(length, BLOCK))
    _scale_to(gen_scores, mass, first // BLOCK, tl.cdiv(length, BLOCK))


@triton.jit
def _logits(
    q,
    k_base,
    first,
    end,
    stride,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """q k^T for the keys [first, first + KEYS): [rows, KEYS], if MASKED -inf from key `end` on."""
    lanes = tl.arange(0, KEYS)
    k = load_rows(k_base, first, lanes, end, stride, HEAD_DIM, DIM, MASKED)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        logits = tl.where((first + lanes < end)[None, :], logits, float("-inf"))
    return logits


@triton.jit
def _add(total, peak, logits, scale_log2):
    """One step of the log-sum-exp of each row, in units of log 2."""
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale_log2)
    weights = tl.exp2(logits * scale_log2 - new_peak[:, None])
    return total * tl.exp2(peak - new_peak) + tl.sum(weights, 1), new_peak


@triton.jit
def _store_means(
    out,
    logits,
    lse,
    first,
    end,
    scale_log2,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Writes to out[block] the mean of exp2(logit - lse) over each key block from `first` on."""
    mass = tl.exp2(logits * scale_log2 - lse[:, None])
    # A row's own sum first: a row lies in the registers of few threads.
    by_block = tl.sum(tl.reshape(mass, [TILE, KEYS // BLOCK, BLOCK]), 2)
    means = tl.sum(by_block, 0) * (1.0 / (TILE * BLOCK))
    blocks = first // BLOCK + tl.arange(0, KEYS // BLOCK)
    tl.store(out + blocks, means, mask=blocks * BLOCK < end)


@triton.jit
def _scale_to(scores, mass, begin, end):
    """Scales scores [begin, end) so that they sum to `mass`, as exact ones do.

    Tensor cores round towards zero and exp2 is approximate: both errors have one sign, so that a
    block's sum does not average them out.
    """
    lanes = tl.arange(0, 512)
    total = tl.zeros([512], tl.float32)
    for first in tl.range(begin, end, 512):
        total += tl.load(scores + first + lanes, mask=first + lanes < end, other=0.0)
    total = tl.sum(total, 0)
    factor = tl.where(total > 0, mass / total, 1.0)
    for first in tl.range(begin, end, 512):
        mask = first + lanes < end
        places = scores + first + lanes
        tl.store(places, tl.load(places, mask=mask) * factor, mask=mask)
