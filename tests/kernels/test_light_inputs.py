# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What a captured light step reads: the kernel against its twin, to the bit."""

import pytest
import torch
from kernel_cases import DEVICE

from sparsed_vllm.kernels import api, reference
from sparsed_vllm.kernels.canvas import OpenRows
from sparsed_vllm.kernels.layout import PAGE, LightTensors
from sparsed_vllm.kernels.write_light_inputs import write_light_inputs

IMPLEMENTATIONS = {
    "kernel": (write_light_inputs, DEVICE),
    "twin": (reference.write_light_inputs, "cpu"),
    "api": (api.write_light_inputs, DEVICE),
}


def run(write, device, num_rows, num_light, num_reads):
    """What is written over poison, on the CPU, and what it was given."""
    draw = torch.Generator().manual_seed(7)
    inputs = LightTensors(
        *torch.full((3, num_rows), -7, device=device), torch.full((num_rows,), -7.0, device=device)
    )
    rows = torch.randperm(num_light, generator=draw)
    seqs = torch.randint(3, (num_light,), generator=draw)
    places = torch.randint(5 * PAGE, (num_light,), generator=draw)
    pages = torch.randint(1, 90, (4, 6), generator=draw).int()
    reads = None
    if num_reads is not None:
        read_places = torch.arange(num_reads) % 5 - 1
        reads = OpenRows(*(x.to(device) for x in (read_places, rows, rows + 3, rows, rows)))
        reads = reads._replace(batch_rows=(torch.arange(num_reads) * 3).to(device))
    write(inputs, *(x.to(device) for x in (rows, places, seqs, pages)), reads)
    return [x.cpu() for x in inputs], (rows, places, seqs, pages)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("num_rows", "num_light", "num_reads"),
    [(16, 16, 16), (16, 1, 1), (160, 131, 129), (512, 300, 0), (160, 150, None)],
)
def test_rows_of_no_sequence_are_written_to_page_0_and_do_not_count(
    name, num_rows, num_light, num_reads
):
    written, given = run(*IMPLEMENTATIONS[name], num_rows, num_light, num_reads)
    rows, places, seqs, table = given
    pages, offsets, read_rows, weights = written
    assert torch.equal(pages[rows], table[seqs, places // PAGE].long())
    assert torch.equal(offsets[rows], places % PAGE)
    assert not pages[num_light:].any() and not offsets[num_light:].any()
    if num_reads is None:
        assert (read_rows == -7).all() and (weights == -7).all()
        return
    assert torch.equal(read_rows[:num_reads], torch.arange(num_reads) * 3)
    assert torch.equal(weights[:num_reads], (torch.arange(num_reads) % 5 > 0).float())
    assert not read_rows[num_reads:].any() and not weights[num_reads:].any()
