# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: NaN to 0 in place. What holds none is read and not written."""

import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 4096  # of a program


def drop_nans(rows: Tensor) -> None:
    """See reference.drop_nans."""
    total = rows.numel()
    if total:
        _drop_nans_kernel[(triton.cdiv(total, NUMBERS),)](
            rows,
            total,
            rows.stride(0),
            WIDTH=rows.shape[1] * rows.shape[2],
            NUMBERS=NUMBERS,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["total"], do_not_specialize_on_alignment=["rows_ptr"])
def _drop_nans_kernel(rows_ptr, total, stride, WIDTH: tl.constexpr, NUMBERS: tl.constexpr):
    """Program (NUMBERS numbers of all rows, laid end to end)."""
    index = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    own = rows_ptr + index // WIDTH * stride + index % WIDTH
    numbers = tl.load(own, mask=index < total, other=0.0)
    wide = numbers.to(tl.float32)
    is_nan = wide != wide
    if tl.max(is_nan.to(tl.int32), 0) > 0:
        tl.store(own, tl.zeros_like(numbers), mask=is_nan)
