# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: how much softmax mass a few query rows put on each token, its keys in pages.

A short sequence has few tiles of keys, so a program takes one head of them, and a second kernel
adds the heads up, always in the same order: a sequence's result depends on itself alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.layout import BatchLayout, num_blocks
from sparsed_vllm.kernels.tiles import (
    KEY_LEN,
    LOG2_E,
    NUM_ROWS,
    PAGE,
    PAGE_ROW,
    QUERY_START,
    column,
    head_options,
    load_rows,
)


def token_mass(
    q: Tensor,
    keys: Tensor,
    lse: Tensor,
    layout: BatchLayout,
    pages: Tensor,
    weights: Tensor,
    slots: Tensor,
    mass: Tensor,
    *,
    scale: float,
) -> None:
    """See reference.token_mass. Takes 4 bytes for each token and key head meanwhile."""
    num_kv_heads, most_pages = keys.shape[2], num_blocks(layout.max_key_len, PAGE.value)
    if not most_pages or not layout.num_query_rows:
        return
    num_tokens = int(-(-layout.host[KEY_LEN.value] // PAGE.value).sum()) * PAGE.value
    parts = q.new_empty(num_kv_heads, num_tokens, dtype=torch.float32)
    options = _options(q)
    tiles = most_pages * (PAGE.value // options["KEYS"])
    _head_mass_kernel[(tiles, num_kv_heads, layout.num_seqs)](
        q,
        keys,
        lse,
        pages,
        weights,
        parts,
        layout.columns,
        layout.num_seqs,
        scale * LOG2_E.value,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        lse.stride(0),
        lse.stride(1),
        pages.stride(0),
        num_tokens,
        GROUP=q.shape[1] // num_kv_heads,
        **head_options(q),
        **options,
    )
    _add_heads_kernel[(most_pages, layout.num_seqs)](
        parts,
        slots,
        mass,
        layout.columns,
        layout.num_seqs,
        num_kv_heads,
        num_tokens,
        mass.stride(0),
        num_warps=4,
    )


def _options(q: Tensor) -> dict[str, Any]:
    """ROWS: query rows of a step;  KEYS: keys of a program, a part of a page"""
    if q.dtype == torch.float32:  # no tensor cores, and operands held in registers
        return {"ROWS": 16, "KEYS": 32, "num_warps": 4, "num_stages": 1}
    keys = 128 if q.shape[2] <= 128 else 64
    return {"ROWS": 64, "KEYS": keys, "num_warps": 4, "num_stages": 2}


@triton.jit
def _is_nothing(columns, num_seqs, sequence, first):
    """Whether a sequence has no keys from place `first` on, or no rows that attend to them."""
    num_rows = column(columns, num_seqs, NUM_ROWS, sequence)
    return (num_rows == 0) | (first >= column(columns, num_seqs, KEY_LEN, sequence))


@triton.jit
def _parts_before(columns, num_seqs, sequence):
    """Where a sequence's parts begin: behind the whole pages of the sequences before it."""
    lanes = tl.arange(0, 64)
    num_pages = tl.zeros([64], tl.int32)
    for first in range(0, sequence, 64):
        before = first + lanes < sequence
        key_lens = tl.load(columns + KEY_LEN * num_seqs + first + lanes, mask=before, other=0)
        num_pages += tl.cdiv(key_lens, PAGE)
    return tl.sum(num_pages, 0).to(tl.int64) * PAGE


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=[
        "num_seqs",
        "stride_lse_head",
        "stride_lse_row",
        "stride_pages",
    ],
    do_not_specialize_on_alignment=["lse_ptr", "pages_ptr", "weights_ptr", "columns"],
)
def _head_mass_kernel(
    q_ptr,
    keys_ptr,
    lse_ptr,
    pages_ptr,
    weights_ptr,
    parts_ptr,
    columns,
    num_seqs,
    scale_log2,
    stride_q_row,
    stride_q_head,
    stride_page,
    stride_key,
    stride_key_head,
    stride_lse_head,
    stride_lse_row,
    stride_pages,
    num_tokens,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (KEYS tokens, key head, sequence): writes the mass of the rows of the head's group.

    Keys lie along the rows of the product: a key's sum then stays in the registers of few threads.
    """
    first = tl.program_id(0) * KEYS
    kv_head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2)
    if _is_nothing(columns, num_seqs, sequence, first):
        return
    query_start = column(columns, num_seqs, QUERY_START, sequence).to(tl.int64)
    num_rows = column(columns, num_seqs, NUM_ROWS, sequence)
    page_row = column(columns, num_seqs, PAGE_ROW, sequence).to(tl.int64)
    page = tl.load(pages_ptr + page_row * stride_pages + first // PAGE).to(tl.int64)
    lanes = tl.arange(0, KEYS)

    # A page's keys past the sequence's end may be anything: no other key's sum reads them.
    k_base = keys_ptr + page * stride_page + kv_head * stride_key_head
    k = load_rows(k_base, first % PAGE, lanes, PAGE, stride_key, HEAD_DIM, DIM, False)
    total = tl.zeros([KEYS], tl.float32)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        q_base = q_ptr + query_start * stride_q_row + head * stride_q_head
        lse_base = lse_ptr + query_start * stride_lse_row + head * stride_lse_head
        for first_row in tl.range(0, num_rows, ROWS):
            rows = first_row + tl.arange(0, ROWS)
            inside = rows < num_rows
            q = load_rows(q_base, 0, rows, num_rows, stride_q_row, HEAD_DIM, DIM, True)
            lse = tl.load(lse_base + rows.to(tl.int64) * stride_lse_row, mask=inside, other=0.0)
            weights = tl.load(weights_ptr + query_start + rows, mask=inside, other=0.0)
            logits = tl.dot(k, tl.trans(q), input_precision="ieee")
            mass = weights[None, :] * tl.exp2(logits * scale_log2 - (lse * LOG2_E)[None, :])
            # A row that does not count may be NaN, and 0 * NaN is NaN.
            total += tl.sum(tl.where((weights != 0)[None, :], mass, 0.0), 1)
    parts = parts_ptr + kv_head * num_tokens + _parts_before(columns, num_seqs, sequence)
    tl.store(parts + first + lanes, total)


@triton.jit(
    do_not_specialize=["num_seqs", "stride_mass"],
    do_not_specialize_on_alignment=["slots_ptr", "columns", "mass_ptr"],
)
def _add_heads_kernel(
    parts_ptr,
    slots_ptr,
    mass_ptr,
    columns,
    num_seqs,
    num_kv_heads,
    num_tokens,
    stride_mass,
):
    """Program (page, sequence): adds the parts of all key heads to the sequence's mass."""
    first = tl.program_id(0) * PAGE
    sequence = tl.program_id(1)
    if _is_nothing(columns, num_seqs, sequence, first):
        return
    places = first + tl.arange(0, PAGE)
    parts = parts_ptr + _parts_before(columns, num_seqs, sequence) + places
    total = tl.zeros([PAGE], tl.float32)
    for _ in range(num_kv_heads):
        total += tl.load(parts)
        parts += num_tokens
    slot = tl.load(slots_ptr + sequence)
    own = mass_ptr + slot * stride_mass + places
    inside = places < column(columns, num_seqs, KEY_LEN, sequence)
    tl.store(own, tl.load(own, mask=inside) + total, mask=inside)
