# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The development environment's stand-ins for vLLM's kernels compute what those do, to the bit."""

import functools
import inspect
from importlib import import_module

import pytest
import torch
from triton.runtime import interpreter

twins = pytest.importorskip("triton_cpu_stub.twins", reason="vLLM runs its kernels on the GPU")

SLOTS, LONGEST, PAGES = 6, 40, 9
"""Requests that an engine has room for, their tokens, and the pages of each."""


class Step:
    """Random requests in a step: what vLLM's runner gives its kernels."""

    def __init__(self, num_reqs):
        ints = functools.partial(torch.randint, dtype=torch.int32)
        self.num_reqs = num_reqs
        self.reqs = torch.randperm(SLOTS)[:num_reqs].int()
        rows = ints(0, 12, (num_reqs,))
        self.starts = torch.cat([torch.zeros(1), rows.cumsum(0)]).int()
        self.num_rows = int(self.starts[-1])
        self.num_computed = ints(0, LONGEST - 20, (SLOTS,))
        self.prefill_lens = ints(1, LONGEST, (SLOTS,))
        self.seq_lens = self.num_computed[self.reqs.long()] + rows
        self.all_ids = ints(0, 999, (SLOTS, LONGEST))
        self.tables, self.gathered = ints(1, 99, (2, SLOTS, PAGES))
        self.positions = torch.randint(0, LONGEST, (64,))
        self.ids = torch.full((64,), -7, dtype=torch.int32)
        self.drafts = torch.randint(0, 999, (SLOTS, 3))


def address_of(table):
    return torch.tensor([table.data_ptr()]).to(torch.uint64)


def gather_block_tables(step):
    widths, counts = torch.tensor([PAGES], dtype=torch.int32), torch.arange(SLOTS).int()[None]
    addresses = (
        torch.tensor([x.data_ptr()]).to(torch.uint64) for x in (step.tables, step.gathered)
    )
    args = (step.reqs, *addresses, widths, counts, counts.stride(0), step.num_reqs)
    return (1, SLOTS), args, {"BLOCK_SIZE": 4}


def compute_slot_mappings(step):
    step.reqs[::3] = -1
    slots = torch.full((1, 64), -7)
    one = torch.ones(1, dtype=torch.int32)
    of_group = (
        address_of(step.tables),
        PAGES * one,
        8 * one,
        torch.tensor([True]),
        torch.tensor([False]),
    )
    args = (64, step.reqs, step.starts, step.positions, *of_group, slots, slots.stride(0), 0)
    options = {"CP_SIZE": 1, "CP_INTERLEAVE": 1, "PAD_ID": -1, "TRITON_BLOCK_SIZE": 4}
    return (1, step.num_reqs + 1), args, options


def prepare_prefill_inputs(step):
    ahead = torch.full((3, SLOTS), -7, dtype=torch.int32)
    of_rows = (step.ids, ahead, ahead.stride(0), 3, step.reqs, step.starts)
    known = (step.all_ids, step.all_ids.stride(0), step.prefill_lens, step.num_computed)
    return (step.num_reqs,), (*of_rows, *known), {"BLOCK_SIZE": 4, "LOOKAHEAD_BLOCK": 4}


def prepare_pos_seq_lens(step):
    lens = torch.full((SLOTS,), -7, dtype=torch.int32)
    args = (step.positions, lens, step.reqs, step.starts, step.num_computed, SLOTS)
    return (step.num_reqs + 1,), args, {"BLOCK_SIZE": 4}


def combine_sampled_and_draft_tokens(step, new=1):
    logits = torch.randint(1, 4, (step.num_reqs,))
    ends = torch.cat([torch.zeros(1), logits.cumsum(0)]).int()
    step.starts = torch.arange(step.num_reqs + 1).int() * 4  # as many rows as logits at least
    last = torch.randint(0, 999, (SLOTS, 1))
    of_rows = (step.ids, step.reqs, last, step.starts, step.seq_lens + 4, step.prefill_lens)
    found = torch.full((int(ends[-1]),), -7)
    args = (*of_rows, step.drafts, step.drafts.stride(0), ends, found)
    return (step.num_reqs,), args, {"BLOCK_SIZE": 4, "NUM_NEW_SAMPLED_TOKENS": new}


def post_update(step, counts=None, starts=None):
    step.reqs[::3] = -1
    sampled = torch.randint(0, 5, (step.num_reqs, 4))
    taken, rejected = torch.randint(0, 5, (2, step.num_reqs), dtype=torch.int32)
    stride = 0 if counts is None else counts.stride(0)
    of_slots = (step.num_computed, torch.zeros(SLOTS, 1, dtype=torch.int64), counts, stride)
    of_rows = (sampled, sampled.stride(0), taken, rejected, starts)
    lengths = torch.randint(0, LONGEST - 5, (SLOTS,), dtype=torch.int32)
    args = (step.reqs, *of_slots, *of_rows, step.all_ids, step.all_ids.stride(0), lengths)
    return (step.num_reqs,), args, {"num_warps": 1}


def apply_write(step, output=None):
    output = step.all_ids if output is None else output
    most = 1 if output.dim() == 1 else 9
    counts = torch.randint(1, most + 1, (step.num_reqs,))
    starts = torch.randint(0, most, (step.num_reqs,), dtype=torch.int32)
    contents = torch.randint(0, 999, (int(counts.sum()),)).to(output.dtype)
    written = (step.reqs, starts, contents, counts.cumsum(0).int(), None)
    options = {"BLOCK_SIZE": 4, "MULTI_GROUP": False}
    return (step.num_reqs,), (output, output.stride(0), *written), options


def without_new_tokens(step):
    return combine_sampled_and_draft_tokens(step, new=0)


def post_update_of_counts(step):
    return post_update(step, torch.zeros(SLOTS, 5, dtype=torch.int32), step.starts)


def apply_write_to_a_vector(step):
    return apply_write(step, torch.zeros(SLOTS))


LAUNCHES = {
    gather_block_tables: "_gather_block_tables_kernel",
    compute_slot_mappings: "_compute_slot_mappings_kernel",
    prepare_prefill_inputs: "_prepare_prefill_inputs_kernel",
    prepare_pos_seq_lens: "_prepare_pos_seq_lens_kernel",
    combine_sampled_and_draft_tokens: "_combine_sampled_and_draft_tokens_kernel",
    without_new_tokens: "_combine_sampled_and_draft_tokens_kernel",
    post_update: "_post_update_kernel",
    post_update_of_counts: "_post_update_kernel",
    apply_write: "_apply_write_kernel",
    apply_write_to_a_vector: "_apply_write_kernel",
}


def test_every_twin_is_held_against_its_kernel():
    assert {name for _, name in twins.TWINS} == set(LAUNCHES.values())


@pytest.mark.parametrize("num_reqs", [0, 1, 6])
@pytest.mark.parametrize("make", LAUNCHES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_a_twin_writes_what_its_kernel_writes(make, num_reqs, seed):
    (twin,) = (key for key in twins.TWINS if key[1] == LAUNCHES[make])
    kernel = getattr(import_module(twin[0]), twin[1])

    def interpret(grid, args, options):
        run = inspect.unwrap(interpreter.InterpretedFunction.run)  # an engine may have replaced it
        run(kernel, *args, grid=grid, warmup=False, **options)

    def launch_twin(grid, args, options):
        parameters = twins.parameters_of(kernel.fn, kernel.arg_names, args, options)
        twins.TWINS[twin](grid, parameters)

    written = [written_by(launch, make, num_reqs, seed) for launch in (interpret, launch_twin)]
    assert all(torch.equal(x, y) for x, y in zip(*written, strict=True))


def written_by(launch, make, num_reqs, seed):
    """All memory that a launch could write to, afterwards."""
    torch.manual_seed(seed)
    step = Step(num_reqs)
    grid, args, options = make(step)
    launch(grid, args, options)
    tensors = [x for x in (*vars(step).values(), *args) if isinstance(x, torch.Tensor)]
    return [x for x in tensors if x.dtype != torch.uint64]  # addresses
