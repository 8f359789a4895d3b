# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: keys and values of a step's rows into the pages of their sequences."""

import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.tiles import head_options

ROWS = tl.constexpr(16)  # of a program


def write_pages(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    offsets: Tensor,
    rows: Tensor | None = None,
) -> None:
    """See reference.write_pages."""
    if not len(pages):
        return
    _write_pages_kernel[(triton.cdiv(len(pages), ROWS.value), k.shape[1])](
        k,
        v,
        keys,
        values,
        pages,
        offsets,
        rows,
        len(pages),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        **head_options(k),
        num_warps=4,
    )


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["pages_ptr", "offsets_ptr", "rows_ptr"],
)
def _write_pages_kernel(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    pages_ptr,
    offsets_ptr,
    rows_ptr,
    num_rows,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_page,
    stride_key,
    stride_key_head,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Program (ROWS rows, key head)."""
    numbers = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, DIM)
    inside = numbers < num_rows
    page = tl.load(pages_ptr + numbers, mask=inside, other=-1).to(tl.int64)
    offset = tl.load(offsets_ptr + numbers, mask=inside, other=0).to(tl.int64)
    if rows_ptr is None:
        row = numbers.to(tl.int64)
    else:
        row = tl.load(rows_ptr + numbers, mask=inside, other=0).to(tl.int64)
    mask = (page >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
    sources = row[:, None] * stride_k_row + head * stride_k_head + dims[None, :]
    places = (page * stride_page + offset * stride_key + head * stride_key_head)[:, None]
    tl.store(keys_ptr + places + dims[None, :], tl.load(k_ptr + sources, mask=mask), mask=mask)
    sources = row[:, None] * stride_v_row + head * stride_v_head + dims[None, :]
    v = tl.load(v_ptr + sources, mask=mask)
    wide = v.to(tl.float32)
    v = tl.where(wide == wide, v, 0.0)  # NaN alone differs from itself
    tl.store(values_ptr + places + dims[None, :], v, mask=mask)
