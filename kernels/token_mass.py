# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: how much softmax mass a few query rows put on each token, its keys in pages.

One kernel computes the mass of a tile of rows of a key head, and a second one adds tiles and heads
up, always in the same order: a sequence's result depends on itself alone. As in the attention of
few rows, grids follow the layout's `host`, which in a CUDA graph holds bounds.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.layout import BatchLayout, num_blocks
from sparsed_vllm.kernels.splits import grouped_rows, load_grouped
from sparsed_vllm.kernels.tiles import (
    KEY_LEN,
    LOG2_E,
    NUM_ROWS,
    PAGE,
    PAGE_ROW,
    QUERY_START,
    column,
    head_options,
    in_page,
    load_rows,
)

_PROGRAMS = 1056  # of a launch: enough to occupy a GPU; with more pages each takes more
ADDED = tl.constexpr(16)  # parts that are added at once


@dataclass(frozen=True)
class MassTiles:
    """rows: of a program: rows of the sequence, each with the query heads of a key head

    keys: of a step, at most a page
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, tile: int, group: int, q: Tensor) -> "MassTiles":
        if q.dtype == torch.float32:  # no tensor cores, and operands held in registers
            return cls(16, 32, num_warps=4, num_stages=1)
        rows = min(triton.next_power_of_2(tile * group), 128 if q.shape[2] <= 128 else 64)
        return cls(rows, 64, num_warps=4, num_stages=3)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "ROWS": self.rows,
            "KEYS": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


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
    tiles: MassTiles | None = None,
) -> None:
    """See reference.token_mass. tiles: None: the ones that suit the sizes

    Takes 4 bytes for each token, key head, and tile of rows meanwhile.
    """
    heads, most_pages = keys.shape[2], num_blocks(layout.max_key_len, PAGE.value)
    if not most_pages or not layout.max_num_rows:
        return
    group = q.shape[1] // heads
    tiles = tiles or MassTiles.of(layout.tile, group, q)
    num_tiles = triton.cdiv(layout.max_num_rows * group, tiles.rows)
    num_tokens = int(-(-layout.host[KEY_LEN.value] // PAGE.value).sum()) * PAGE.value
    parts = q.new_empty(num_tiles * heads, num_tokens, dtype=torch.float32)
    programs = min(_PROGRAMS // layout.num_seqs, num_tiles * heads * most_pages)
    _mass_parts_kernel[(max(programs, num_tiles * heads), layout.num_seqs)](
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
        HEADS=heads,
        GROUP=group,
        **head_options(q),
        **tiles.options,
    )
    _add_parts_kernel[(most_pages, layout.num_seqs)](
        parts,
        slots,
        mass,
        layout.columns,
        layout.num_seqs,
        num_tokens,
        mass.stride(0),
        HEADS=heads,
        GROUP=group,
        ROWS=tiles.rows,
        num_warps=4,
    )


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
def _mass_parts_kernel(
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
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (share of the pages, key head and tile of rows; sequence).

    Keys lie along the rows of the product: a key's sum then stays in the registers of few threads.
    Each key's sum is its own, so that nothing depends on how pages are shared out.
    """
    sequence = tl.program_id(1)
    num_rows = column(columns, num_seqs, NUM_ROWS, sequence)
    key_len = column(columns, num_seqs, KEY_LEN, sequence)
    if (num_rows == 0) | (key_len == 0):
        return
    num_tiles = tl.cdiv(num_rows * GROUP, ROWS)
    num_pages = tl.cdiv(key_len, PAGE)
    shares = tl.minimum(tl.num_programs(0) // (num_tiles * HEADS), num_pages)
    share = tl.program_id(0) // (num_tiles * HEADS)
    if share >= shares:
        return
    head = tl.program_id(0) // num_tiles % HEADS
    tile = tl.program_id(0) % num_tiles
    first = num_pages * share // shares * PAGE
    end = tl.minimum(num_pages * (share + 1) // shares * PAGE, key_len)
    query_start = column(columns, num_seqs, QUERY_START, sequence).to(tl.int64)
    page_row = column(columns, num_seqs, PAGE_ROW, sequence).to(tl.int64)
    table = pages_ptr + page_row * stride_pages
    k_base = keys_ptr + head * stride_key_head
    parts = parts_ptr + (tile * HEADS + head).to(tl.int64) * num_tokens
    parts += _parts_before(columns, num_seqs, sequence)

    rows, heads = grouped_rows(tile * ROWS, head, ROWS, GROUP)
    weights = tl.load(weights_ptr + query_start + rows, mask=rows < num_rows, other=0.0)
    # A row that does not count may be NaN, and 0 * NaN is NaN.
    counts = weights != 0
    q_base = q_ptr + query_start * stride_q_row
    q = load_grouped(q_base, rows, heads, counts, stride_q_row, stride_q_head, HEAD_DIM, DIM)
    lse = lse_ptr + (query_start + rows) * stride_lse_row + heads.to(tl.int64) * stride_lse_head
    lse = tl.load(lse, mask=counts, other=0.0) * LOG2_E
    lanes = tl.arange(0, KEYS)
    for place in tl.range(first, end, KEYS):
        page, start, _, past = in_page(table, place, lanes, end, False)
        # A page's keys past the sequence's end may be anything: no other key's sum reads them.
        base = k_base + page * stride_page
        k = load_rows(base, start, lanes, past, stride_key, HEAD_DIM, DIM, False)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee")
        mass = weights[None, :] * tl.exp2(logits * scale_log2 - lse[None, :])
        total = tl.sum(tl.where(counts[None, :], mass, 0.0), 1)
        tl.store(parts + place + lanes, total)


@triton.jit(
    do_not_specialize=["num_seqs", "stride_mass"],
    do_not_specialize_on_alignment=["slots_ptr", "columns", "mass_ptr"],
)
def _add_parts_kernel(
    parts_ptr,
    slots_ptr,
    mass_ptr,
    columns,
    num_seqs,
    num_tokens,
    stride_mass,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (page, sequence): adds the parts of all tiles and heads to the sequence's mass."""
    sequence = tl.program_id(1)
    num_rows = column(columns, num_seqs, NUM_ROWS, sequence)
    key_len = column(columns, num_seqs, KEY_LEN, sequence)
    places = tl.program_id(0) * PAGE + tl.arange(0, PAGE)
    if (num_rows == 0) | (tl.program_id(0) * PAGE >= key_len):
        return
    num_parts = tl.cdiv(num_rows * GROUP, ROWS) * HEADS
    parts = parts_ptr + _parts_before(columns, num_seqs, sequence) + places
    inside = places < key_len
    total = tl.zeros([PAGE], tl.float32)
    for first in range(0, num_parts, ADDED):
        numbers = first + tl.arange(0, ADDED)
        mask = (numbers < num_parts)[:, None] & inside[None, :]
        pointers = parts[None, :] + numbers.to(tl.int64)[:, None] * num_tokens
        total += tl.sum(tl.load(pointers, mask=mask, other=0.0), 0)
    own = mass_ptr + tl.load(slots_ptr + sequence) * stride_mass + places
    tl.store(own, tl.load(own, mask=inside) + total, mask=inside)
