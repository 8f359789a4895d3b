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
from sparsed_vllm.kernels.layout import QueryBlocks
from sparsed_vllm.kernels.tiles import LOG2_E, LOWEST, head_options, load_rows


def block_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    blocks: QueryBlocks,
    *,
    scale: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See reference.block_scores."""
    assert scale > 0, "the maximum is taken before scaling"
    assert lse is None or lse.is_contiguous()
    if q.is_cuda and q.dtype == torch.float32:
        # Without tensor cores the tiles are held in registers, and outgrow them.
        return reference.block_scores(q, k, lse, blocks, scale=scale, out=out)
    scores, gen_scores = out or reference.empty_scores(q, blocks)
    assert scores.stride() == gen_scores.stride() and scores.stride(2) == 1
    scores.fill_(float("-inf"))
    gen_scores.fill_(float("-inf"))
    _launch(q, k, lse, blocks, scores, gen_scores, scale, with_prompt=True)
    return scores, gen_scores


def score_generation(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    blocks: QueryBlocks,
    scores: Tensor,
    gen_scores: Tensor,
    scale: float,
) -> None:
    """What is left of block_scores when the prompts' blocks have been scored."""
    _launch(q, k, lse, blocks, scores, gen_scores, scale, with_prompt=False)


def _launch(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    blocks: QueryBlocks,
    scores: Tensor,
    gen_scores: Tensor,
    scale: float,
    *,
    with_prompt: bool,
) -> None:
    if blocks.num_blocks:
        _block_scores_kernel[(blocks.num_blocks, q.shape[1])](
            *(q, k, lse, scores, gen_scores),
            *(blocks.starts, blocks.lengths, blocks.indices, blocks.first_gens),
            *(q.shape[0], scale * LOG2_E.value),
            *(stride for x in (q, k, scores) for stride in x.stride()[:2]),
            GROUP=q.shape[1] // k.shape[1],
            BLOCK=blocks.block_size,
            HAS_LSE=lse is not None,
            WITH_PROMPT=with_prompt,
            **head_options(q),
            **_options(blocks.block_size, q),
        )


def _options(block_size: int, q: Tensor) -> dict[str, int]:
    """KEYS: key places of a step, whole blocks of them."""
    options = {
        "KEYS": max(block_size, 128 if q.shape[2] <= 128 else 32),
        "num_warps": 8 if block_size == 128 else 4,
        "num_stages": 2,
    }
    if block_size == q.shape[2] == 128 and _is_hopper(q.device):
        options["maxnreg"] = 128  # two programs then share a multiprocessor, and nothing spills
    return options


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(do_not_specialize=["num_tokens", "stride_scores_head", "stride_scores_block"])
def _block_scores_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    scores_ptr,
    gen_scores_ptr,
    starts,
    lengths,
    indices,
    first_gens,
    num_tokens,
    scale_log2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_scores_head,
    stride_scores_block,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_LSE: tl.constexpr,
    WITH_PROMPT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (query block, head)."""
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(starts + block).to(tl.int64)
    length = tl.load(lengths + block)
    first = tl.load(first_gens + block) * BLOCK
    index = tl.load(indices + block)
    rows = index * BLOCK + tl.arange(0, BLOCK)
    q_base = q_ptr + start * stride_qt + head * stride_qh
    k_base = k_ptr + start * stride_kt + head // GROUP * stride_kh
    scores_row = head * stride_scores_head + block * stride_scores_block
    scores = scores_ptr + scores_row
    gen_scores = gen_scores_ptr + scores_row

    q = load_rows(q_base, 0, rows, length, stride_qt, HEAD_DIM, DIM, True)
    total = tl.zeros([BLOCK], tl.float32)
    peak = tl.full([BLOCK], LOWEST, tl.float32)
    for at in tl.range(first, length, KEYS):
        logits = _logits(q, k_base, at, length, stride_kt, HEAD_DIM, DIM, KEYS, True)
        total, peak = _add(total, peak, logits, scale_log2)
    gen_lse = peak + tl.log2(total)
    if HAS_LSE:
        lse = tl.load(lse_ptr + head * num_tokens + start + rows, mask=rows < length) * LOG2_E
    else:
        for at in tl.range(0, first, KEYS):
            logits = _logits(q, k_base, at, first, stride_kt, HEAD_DIM, DIM, KEYS, True)
            total, peak = _add(total, peak, logits, scale_log2)
        lse = peak + tl.log2(total)
    # exp2(logit - inf) is 0: rows past the end have no mass.
    lse = tl.where(rows < length, lse, float("inf"))
    gen_lse = tl.where(rows < length, gen_lse, float("inf"))

    if WITH_PROMPT:
        whole = first // KEYS * KEYS
        for at in tl.range(0, whole, KEYS):
            logits = _logits(q, k_base, at, first, stride_kt, HEAD_DIM, DIM, KEYS, False)
            _store_means(scores, logits, lse, at, first, scale_log2, BLOCK, KEYS)
        if whole < first:
            logits = _logits(q, k_base, whole, first, stride_kt, HEAD_DIM, DIM, KEYS, True)
            _store_means(scores, logits, lse, whole, first, scale_log2, BLOCK, KEYS)
    for at in tl.range(first, length, KEYS):
        logits = _logits(q, k_base, at, length, stride_kt, HEAD_DIM, DIM, KEYS, True)
        _store_means(scores, logits, lse, at, length, scale_log2, BLOCK, KEYS)
        _store_means(gen_scores, logits, gen_lse, at, length, scale_log2, BLOCK, KEYS)

    mass = tl.minimum(length - index * BLOCK, BLOCK) * (1.0 / (BLOCK * BLOCK))
    tl.debug_barrier()  # what one thread wrote above, others read
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
def _store_means(out, logits, lse, first, end, scale_log2, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """Writes to out[block] the mean of exp2(logit - lse) over each key block from `first` on."""
    mass = tl.exp2(logits * scale_log2 - lse[:, None])
    # A row's own sum first: its numbers lie in few threads.
    by_block = tl.sum(tl.reshape(mass, [BLOCK, KEYS // BLOCK, BLOCK]), 2)
    means = tl.sum(by_block, 0) * (1.0 / (BLOCK * BLOCK))
    blocks = first // BLOCK + tl.arange(0, KEYS // BLOCK)
    tl.store(out + blocks, means, mask=blocks * BLOCK < end)


@triton.jit
def _scale_to(scores, mass, begin, end):
    """Scales scores [begin, end) so that they sum to `mass`, as exact ones do.

    Tensor cores round towards zero and exp2 is approximate: both err to one side, which no sum
    over a block evens out.
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
