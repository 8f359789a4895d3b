# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: NaN to 0 in place. What holds none is read and not written."""

import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.relaunch import relaunch

NUMBERS = 4096  # of a program


def drop_nans(rows: Tensor) -> None:
    """See reference.drop_nans."""
    total, stride, width = rows.numel(), rows.stride(0), rows.shape[1] * rows.shape[2]
    if total:
        relaunch(
            _drop_nans_kernel,
            (triton.cdiv(total, NUMBERS), 1, 1),
            (rows.device, rows.dtype, stride, width, total >> 31),
            rows,
            total,
            stride,
            width,
            NUMBERS,
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
