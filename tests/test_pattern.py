# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A request's table before its recording step has written it."""

import pytest
import torch

from sparsed_vllm.config import Sparsity
from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.layout import most_kept
from sparsed_vllm.pattern import Pattern, num_bytes_at_most
from sparsed_vllm.recorded_tables import RecordedTables

NUM_TOKENS, NUM_HEADS = 50, 2


@pytest.fixture
def pattern(monkeypatch):
    """A table of two layers, on memory that held something else."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: empty(*shape, **kwargs).fill_(99))
    return Pattern(
        Sparsity(skip=0.2, select=0.3, block_size=16),
        num_prompt_tokens=30,
        num_tokens=NUM_TOKENS,
        num_layers=2,
        num_heads=NUM_HEADS,
        device=torch.device("cpu"),
    )


def test_a_window_of_a_table_has_the_blocks_and_rows_of_its_tokens(pattern):
    blocks, rows = pattern.within(slice(16, 48))
    assert blocks.indices.tolist() == rows.tolist() == [1, 2]
    assert blocks.query_starts.tolist() == [-16, -16]
    assert blocks.lengths.tolist() == [NUM_TOKENS] * 2


def test_a_window_of_all_tokens_is_the_whole_table(pattern):
    blocks, rows = pattern.within(slice(0, NUM_TOKENS))
    assert blocks is pattern.blocks and rows is pattern.rows


def test_a_window_is_made_anew_only_where_it_differs(pattern):
    first = pattern.within(slice(16, 48))
    assert pattern.within(slice(16, 48))[0] is first[0]
    assert pattern.within(slice(32, NUM_TOKENS))[1].tolist() == [2, 3]


def test_a_table_that_was_not_recorded_counts_no_blocks(pattern):
    assert RecordedTables({"0": pattern}).tolists()["0"].kept == 0


def test_a_table_that_was_not_recorded_has_no_ids_to_follow(pattern):
    q, k, v = torch.randn(3, NUM_TOKENS, NUM_HEADS, 64)
    out = torch.ones_like(q)
    api.block_sparse_attention(q, k, v, pattern.blocks, *pattern.of_layer(1), scale=1.0, out=out)
    assert not out.any()


def table(num_blocks, select=0.3, num_prompt_tokens=0):
    return Pattern(
        Sparsity(skip=0.2, select=select, block_size=16),
        num_prompt_tokens=num_prompt_tokens,
        num_tokens=16 * num_blocks,
        num_layers=1,
        num_heads=1,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(("num_blocks", "dtype"), [(32767, torch.int16), (32768, torch.int32)])
def test_ids_widen_where_a_sequence_has_more_key_blocks_than_16_bits_count(num_blocks, dtype):
    wide = table(num_blocks, select=1e-6, num_prompt_tokens=16 * (num_blocks - 1))
    assert wide.kept.dtype == dtype


@pytest.mark.parametrize("count", [1, 3])
def test_the_largest_tables_that_are_admitted_fit_what_profiling_sets_aside(count):
    num_blocks, table_ids = 32, 2
    assert most_kept(num_blocks, 1.0) == 16 * table_ids, "more would be refused"
    longest = 16 * num_blocks
    taken = count * table(num_blocks, select=1.0).num_bytes
    assert taken <= num_bytes_at_most(count * longest, longest, table_ids)


def test_profiling_counts_the_wider_ids_of_long_sequences():
    narrow, wide = (num_bytes_at_most(2**20, 16 * n, table_ids=8) for n in (32767, 32768))
    assert wide > 1.9 * narrow
