# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""In numpy, the kernels of vLLM that its runner launches at every step.

They move integers between rows of requests; to interpret them takes a third of a small model's
step. tests/test_twins.py holds each against its kernel in Triton's interpreter.

A twin takes the grid and `p`, its kernel's parameters by their names, tensors as numpy arrays.
"""

import ctypes
import functools
import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

Grid = tuple[int, ...]


class Rows:
    """A matrix of int32 that a kernel is told by the address of its first row and its width."""

    def __init__(self, address: int, width: int) -> None:
        self.address, self.width = int(address), int(width)

    def __getitem__(self, row: int) -> np.ndarray:
        start = self.address + 4 * self.width * int(row)
        return np.ctypeslib.as_array((ctypes.c_int32 * self.width).from_address(start))


def gather_block_tables(grid: Grid, p: SimpleNamespace) -> None:
    for group, width in enumerate(p.block_table_strides):
        source = Rows(p.src_block_table_ptrs[group], width)
        target = Rows(p.dst_block_table_ptrs[group], width)
        for row in range(grid[1]):
            if row >= p.num_reqs:
                target[row][:] = 0
                continue
            req = p.batch_idx_to_req_idx[row]
            count = p.num_blocks_ptr[group, req]
            target[row][:count] = source[req][:count]


def compute_slot_mappings(grid: Grid, p: SimpleNamespace) -> None:
    assert p.CP_SIZE == 1, "the twin knows no context parallelism"
    num_reqs, starts = grid[1] - 1, p.query_start_loc
    for group, size in enumerate(p.block_sizes):
        slots = p.slot_mappings_ptr[group]
        slots[starts[num_reqs] : p.max_num_tokens] = p.PAD_ID
        table = Rows(p.block_table_ptrs[group], p.block_table_strides[group])
        for row, req in enumerate(p.idx_mapping[:num_reqs]):
            own = slice(starts[row], starts[row + 1])
            if req < 0 or not p.slot_mapping_enabled[group]:  # a request below 0 owns no blocks
                slots[own] = p.PAD_ID
                continue
            blocks, offsets = np.divmod(p.pos[own], size)
            slots[own] = table[req][blocks] * size + offsets


def prepare_prefill_inputs(grid: Grid, p: SimpleNamespace) -> None:
    starts, ahead = p.query_start_loc_ptr, p.num_lookahead
    for row, req in enumerate(p.idx_mapping_ptr[: grid[0]]):
        first, prefill_len = p.num_computed_tokens_ptr[req], p.prefill_lens_ptr[req]
        if first >= prefill_len:
            continue
        end = first + starts[row + 1] - starts[row]
        p.input_ids_ptr[starts[row] : starts[row + 1]] = p.all_token_ids_ptr[req, first:end]
        coming = p.all_token_ids_ptr[req, end : min(end + ahead, prefill_len)]
        p.next_prefill_tokens_ptr[:ahead, req] = 0
        p.next_prefill_tokens_ptr[: len(coming), req] = coming


def prepare_pos_seq_lens(grid: Grid, p: SimpleNamespace) -> None:
    num_reqs, starts = grid[0] - 1, p.query_start_loc_ptr
    p.seq_lens_ptr[num_reqs : p.max_num_reqs] = 0
    for row, req in enumerate(p.idx_mapping_ptr[:num_reqs]):
        first = p.num_computed_tokens_ptr[req]
        end = first + starts[row + 1] - starts[row]
        p.seq_lens_ptr[row] = end
        p.pos_ptr[starts[row] : starts[row + 1]] = np.arange(first, end)


def combine_sampled_and_draft_tokens(grid: Grid, p: SimpleNamespace) -> None:
    for row, req in enumerate(p.idx_mapping_ptr[: grid[0]]):
        first_row, end_row = p.cu_num_logits_ptr[row : row + 2]
        num_logits, end = end_row - first_row, p.query_start_loc_ptr[row + 1]
        start, num_drafts = end - num_logits, num_logits - p.NUM_NEW_SAMPLED_TOKENS
        p.logits_indices_ptr[first_row:end_row] = np.arange(start, end)
        seq_len, prefill_len = p.seq_lens_ptr[row], p.prefill_len_ptr[req]
        if seq_len <= prefill_len:
            continue
        if p.NUM_NEW_SAMPLED_TOKENS and seq_len - num_logits >= prefill_len:
            p.input_ids_ptr[start] = p.last_sampled_tokens_ptr.flat[req]
        p.input_ids_ptr[end - num_drafts : end] = p.draft_tokens_ptr[req, :num_drafts]


def post_update(grid: Grid, p: SimpleNamespace) -> None:
    starts = p.query_start_loc_ptr
    for row, req in enumerate(p.idx_mapping_ptr[: grid[0]]):
        if req < 0:
            continue
        tokens = p.sampled_tokens_ptr[row, : p.num_sampled_ptr[row]]
        if len(tokens):
            length = p.total_len_ptr[req]
            p.last_sampled_tokens_ptr[req] = tokens[-1]
            p.all_token_ids_ptr[req, length : length + len(tokens)] = tokens
            p.total_len_ptr[req] = length + len(tokens)
        if p.output_bin_counts_ptr is not None:
            np.add.at(p.output_bin_counts_ptr[req], tokens, 1)
        num_rows = 0 if starts is None else starts[row + 1] - starts[row]
        p.num_computed_tokens_ptr[req] += num_rows - p.num_rejected_ptr[row]


def apply_write(grid: Grid, p: SimpleNamespace) -> None:
    assert not p.MULTI_GROUP, "the twin writes to one tensor"
    rows = p.output_ptr.reshape(len(p.output_ptr), -1)  # a view: also of a vector
    begin = 0
    for write in range(grid[0]):
        row, start, end = (
            x[write] for x in (p.write_indices_ptr, p.write_starts_ptr, p.write_cu_lens_ptr)
        )
        rows[row, start : start + end - begin] = p.write_contents_ptr[begin:end]
        begin = end


RUNNER = "vllm.v1.worker.gpu"
TWINS: dict[tuple[str, str], Callable[[Grid, SimpleNamespace], None]] = {
    (f"{RUNNER}.block_table", "_gather_block_tables_kernel"): gather_block_tables,
    (f"{RUNNER}.block_table", "_compute_slot_mappings_kernel"): compute_slot_mappings,
    (f"{RUNNER}.input_batch", "_prepare_prefill_inputs_kernel"): prepare_prefill_inputs,
    (f"{RUNNER}.input_batch", "_prepare_pos_seq_lens_kernel"): prepare_pos_seq_lens,
    (f"{RUNNER}.input_batch", "_combine_sampled_and_draft_tokens_kernel"): (
        combine_sampled_and_draft_tokens
    ),
    (f"{RUNNER}.input_batch", "_post_update_kernel"): post_update,
    (f"{RUNNER}.buffer_utils", "_apply_write_kernel"): apply_write,
}
"""By module and name of the kernel."""


def launch_twins(interpreter: ModuleType) -> None:
    """Instead of these kernels; Triton's interpreter runs all others."""
    interpret = interpreter.InterpretedFunction.run

    @functools.wraps(interpret)
    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        twin = TWINS.get((self.fn.__module__, self.fn.__name__))
        if twin is None or warmup:
            interpret(self, *args, grid=grid, warmup=warmup, **options)
        else:
            twin(grid, parameters_of(self.fn, self.arg_names, args, options))

    interpreter.InterpretedFunction.run = run


def parameters_of(
    kernel: Callable[..., None], names: list[str], args: tuple, options: dict[str, Any]
) -> SimpleNamespace:
    """Of a launch, whose options also say how a GPU would run it."""
    own = {name: value for name, value in options.items() if name in names}
    bound = _signature(kernel).bind(*args, **own)
    bound.apply_defaults()
    given = bound.arguments.items()
    return SimpleNamespace(**{k: x.numpy() if hasattr(x, "numpy") else x for k, x in given})


_signature = functools.cache(inspect.signature)
