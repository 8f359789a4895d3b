# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: how much softmax mass each query block puts on each key block."""

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
    if q.dtype == torch.float32 and blocks.block_size * q.shape[2] > 128 * 128:
        # Two such tiles outgrow an H100's shared memory.
        return reference.block_scores(q, k, lse, blocks, scale=scale, out=out)
    scores, gen_scores = out or reference.empty_scores(q, blocks)
    assert scores.stride() == gen_scores.stride() and scores.stride(2) == 1
    scores.fill_(float("-inf"))
    gen_scores.fill_(float("-inf"))
    if blocks.num_blocks:
        _block_scores_kernel[(blocks.num_blocks, q.shape[1])](
            *(q, k, lse, scores, gen_scores),
            *(blocks.starts, blocks.lengths, blocks.indices, blocks.first_gens),
            *(q.shape[0], scale * LOG2_E.value),
            *(stride for x in (q, k, scores) for stride in x.stride()[:2]),
            GROUP=q.shape[1] // k.shape[1],
            BLOCK=blocks.block_size,
            HAS_LSE=lse is not None,
            **head_options(q),
            **_options(blocks.block_size, q),
        )
    return scores, gen_scores


def _options(block_size: int, q: Tensor) -> dict[str, int]:
    """KEYS: key places of a step, whole blocks of them."""
    small = q.dtype == torch.float32 or q.shape[2] > 128
    return {
        "KEYS": max(block_size, 32 if small else 128),
        "num_warps": 8 if block_size == 128 else 4,
        "num_stages": 1 if q.dtype == torch.float32 else 2,
    }


@triton.jit
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
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (query block, head)."""
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(starts + block).to(tl.int64)
    length = tl.load(lengths + block)
    first_gen = tl.load(first_gens + block)
    rows = tl.load(indices + block) * BLOCK + tl.arange(0, BLOCK)
    q_base = q_ptr + start * stride_qt + head * stride_qh
    k_base = k_ptr + start * stride_kt + head // GROUP * stride_kh
    scores_row = head * stride_scores_head + block * stride_scores_block

    q = load_rows(q_base, 0, rows, length, stride_qt, HEAD_DIM, DIM, True)
    if HAS_LSE:
        lse = tl.load(lse_ptr + head * num_tokens + start + rows, mask=rows < length) * LOG2_E
    else:
        lse = _log_sum_exp(q, k_base, 0, length, stride_kt, scale_log2, HEAD_DIM, DIM, KEYS)
    out = scores_ptr + scores_row
    _store_means(
        q, k_base, lse, rows, 0, length, out, stride_kt, scale_log2, BLOCK, HEAD_DIM, DIM, KEYS
    )
    first = first_gen * BLOCK
    lse = _log_sum_exp(q, k_base, first, length, stride_kt, scale_log2, HEAD_DIM, DIM, KEYS)
    out = gen_scores_ptr + scores_row
    _store_means(
        q, k_base, lse, rows, first, length, out, stride_kt, scale_log2, BLOCK, HEAD_DIM, DIM, KEYS
    )


@triton.jit
def _log_sum_exp(
    q,
    k_base,
    begin,
    end,
    stride,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Of the logits of q [rows, DIM] and the keys [begin, end), in units of log 2: [rows]."""
    total = tl.zeros([q.shape[0]], tl.float32)
    peak = tl.full([q.shape[0]], LOWEST, tl.float32)
    lanes = tl.arange(0, KEYS)
    for first in tl.range(begin, end, KEYS):
        k = load_rows(k_base, first, lanes, end, stride, HEAD_DIM, DIM, True)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        logits = tl.where((first + lanes < end)[None, :], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1) * scale_log2)
        weights = tl.exp2(logits * scale_log2 - new_peak[:, None])
        total = total * tl.exp2(peak - new_peak) + tl.sum(weights, 1)
        peak = new_peak
    return peak + tl.log2(total)


@triton.jit
def _store_means(
    q,
    k_base,
    lse,
    rows,
    begin,
    end,
    out,
    stride,
    scale_log2,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Writes to out[block] the mean of exp2(logit - lse) over each key block of [begin, end)."""
    # exp2(logit - inf) is 0: rows past the end have no mass.
    lse = tl.where(rows < end, lse, float("inf"))
    lanes = tl.arange(0, KEYS)
    for first in tl.range(begin, end, KEYS):
        k = load_rows(k_base, first, lanes, end, stride, HEAD_DIM, DIM, True)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        mass = tl.sum(tl.exp2(logits * scale_log2 - lse[:, None]), 0)
        mass = tl.where(first + lanes < end, mass, 0.0)
        means = tl.sum(tl.reshape(mass, [KEYS // BLOCK, BLOCK]), 1) / (BLOCK * BLOCK)
        blocks = first // BLOCK + tl.arange(0, KEYS // BLOCK)
        tl.store(out + blocks, means, mask=blocks * BLOCK < end)
