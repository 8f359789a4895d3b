# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton: what a captured light step reads of the batch that runs it."""

import triton
import triton.language as tl
from torch import Tensor

from sparsed_vllm.kernels.canvas import OpenRows
from sparsed_vllm.kernels.layout import LightTensors
from sparsed_vllm.kernels.tiles import PAGE

ROWS = 128  # of a program


def write_light_inputs(
    inputs: LightTensors,
    rows: Tensor,
    places: Tensor,
    seqs: Tensor,
    pages: Tensor,
    reads: OpenRows | None,
) -> None:
    """See reference.write_light_inputs."""
    num_rows = len(inputs.pages)
    _write_light_inputs_kernel[(triton.cdiv(num_rows, ROWS),)](
        *inputs,
        num_rows,
        rows,
        places,
        seqs,
        len(rows),
        pages,
        pages.stride(0),
        None if reads is None else reads.batch_rows,
        None if reads is None else reads.places,
        0 if reads is None else len(reads.places),
        HAS_READS=reads is not None,
        ROWS=ROWS,
        num_warps=4,
    )


# Nothing depends on what divides these, and each would be compiled for anew.
@triton.jit(
    do_not_specialize=["num_rows", "num_light", "stride_pages", "num_reads"],
    do_not_specialize_on_alignment=[
        "rows_ptr",
        "places_ptr",
        "seqs_ptr",
        "pages_ptr",
        "batch_rows_ptr",
        "read_places_ptr",
    ],
)
def _write_light_inputs_kernel(
    out_pages,
    out_offsets,
    out_read_rows,
    out_weights,
    num_rows,
    rows_ptr,
    places_ptr,
    seqs_ptr,
    num_light,
    pages_ptr,
    stride_pages,
    batch_rows_ptr,
    read_places_ptr,
    num_reads,
    HAS_READS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (ROWS rows)."""
    numbers = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = numbers < num_rows
    is_light = numbers < num_light
    # Those behind the light rows, which are in any order, are rows of their own.
    rows = tl.load(rows_ptr + numbers, mask=is_light, other=0)
    rows = tl.where(is_light, rows, numbers)
    places = tl.load(places_ptr + numbers, mask=is_light, other=0)
    seqs = tl.load(seqs_ptr + numbers, mask=is_light, other=0)
    page = tl.load(pages_ptr + seqs * stride_pages + places // PAGE, mask=is_light, other=0)
    tl.store(out_pages + rows, page, mask=inside)
    tl.store(out_offsets + rows, places % PAGE, mask=inside)
    if HAS_READS:
        is_read = numbers < num_reads
        read_rows = tl.load(batch_rows_ptr + numbers, mask=is_read, other=0)
        read_places = tl.load(read_places_ptr + numbers, mask=is_read, other=-1)
        tl.store(out_read_rows + numbers, read_rows, mask=inside)
        tl.store(out_weights + numbers, (read_places >= 0).to(tl.float32), mask=inside)
