# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Layouts of batches: their tiles, their rows in pages, and how a kernel finds a tile."""

import random

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE

from sparsed_vllm.kernels import tiles
from sparsed_vllm.kernels.layout import (
    FIRST_GEN,
    KEEP_ALL,
    KEEP_GEN,
    PAGE,
    BatchLayout,
    BlockTables,
    Placement,
    Selection,
    host_layout,
    send_layouts,
)


def columns_of(num_rows, key_lens=None, first_rows=None):
    """Sequences of so many query rows; the other columns are told apart by their numbers."""
    count = len(num_rows)
    return {
        "query_starts": [1000 * i for i in range(count)],
        "num_rows": num_rows,
        "first_rows": [0] * count if first_rows is None else first_rows,
        "key_starts": [1000 * i + 7 for i in range(count)],
        "key_lens": num_rows if key_lens is None else key_lens,
        "page_rows": list(range(count)),
    }


def random_sizes(numbers):
    """Rows of up to forty sequences, of which some have none."""
    return [numbers.choice([0, 0, 1, 15, 16, 17, 100]) for _ in range(numbers.randint(1, 40))]


def test_tiles_are_numbered_one_sequence_after_another():
    layout = BatchLayout.of(16, "cpu", **columns_of([17, 0, 16, 1]))
    assert layout.num_tiles == 4 and layout.max_key_blocks == 2
    (first, a), (second, b), (third, c) = layout.sequences()
    assert (first, second, third) == (0, 2, 3)
    assert list(a.tiles(16)) == [(0, slice(0, 16)), (1, slice(16, 17))]
    assert list(b.tiles(16)) == [(2, slice(2000, 2016))]
    assert c == Placement(3000, 1, 0, 3007, 1, 3, 3) and c.keys == slice(3007, 3008)


def test_a_sequence_without_keys_has_no_tiles():
    """As one whose step belongs to another launch."""
    layout = BatchLayout.of(16, "cpu", **columns_of([40, 40], key_lens=[0, 90]))
    assert layout.num_tiles == 3 and [place for place, _ in layout.sequences()] == [1]


def test_an_empty_batch_has_no_tiles():
    layout = BatchLayout.of(16, "cpu", **columns_of([]))
    assert layout.num_seqs == layout.num_tiles == layout.max_key_blocks == 0
    assert layout.num_query_rows == layout.num_key_rows == layout.num_page_rows == 0


def test_only_whole_sequences_can_record():
    assert BatchLayout.of(16, "cpu", **columns_of([40, 3])).is_whole
    assert BatchLayout.of(16, "cpu", **columns_of([40, 3], key_lens=[40, 0])).is_whole
    assert not BatchLayout.of(16, "cpu", **columns_of([40, 3], key_lens=[40, 5])).is_whole
    shifted = columns_of([24], key_lens=[24], first_rows=[16])
    assert not BatchLayout.of(16, "cpu", **shifted).is_whole


def test_a_window_begins_with_a_tile():
    host_layout(32, **columns_of([10], key_lens=[80], first_rows=[32]))
    with pytest.raises(AssertionError, match="begins with a block"):
        host_layout(32, **columns_of([10], key_lens=[80], first_rows=[16]))


def test_layouts_are_sent_together():
    hosts = [
        (16, None, host_layout(16, **columns_of([17, 3]))),
        (128, 32, host_layout(128, **columns_of([]))),
    ]
    sent = send_layouts(hosts, DEVICE)
    for (tile, key_block, host), layout in zip(hosts, sent, strict=True):
        assert layout.tile == tile and layout.key_block == key_block
        assert np.array_equal(layout.columns.cpu().numpy(), host)
    assert send_layouts([], DEVICE) == []


def test_a_query_block_s_lists_lie_in_the_page_of_its_keys():
    layout = BatchLayout.of(32, "cpu", **columns_of([300, 70], [300, 200], [0, 96]))
    pages = torch.tensor([[9, 4, 7, 0], [3, 8, -1, -1]], dtype=torch.int32)
    kept = torch.zeros(10, PAGE // 32, 2, 5, dtype=torch.int16)
    tables = BlockTables(kept, kept[..., 0], pages)
    (_, whole), (_, window) = layout.sequences()
    assert [x.tolist() for x in tables.rows(whole)] == [
        [9, 9, 9, 9, 4, 4, 4, 4, 7, 7],
        [0, 1, 2, 3, 0, 1, 2, 3, 0, 1],
    ]
    assert [x.tolist() for x in tables.rows(window)] == [[3, 8, 8], [3, 0, 1]]


def test_a_selection_counts_the_blocks_of_each_sequence():
    layout = BatchLayout.of(16, DEVICE, **columns_of([160, 0, 40]))
    selection = Selection.of(layout, [90, 0, 40], [0.3, 0.3, 1.0])
    assert selection.host[:, 0].tolist() == [6, 4, 2]
    assert selection.host[[FIRST_GEN, KEEP_ALL, KEEP_GEN], 2].tolist() == [2, 3, 1]
    assert selection.most_kept == 6
    assert np.array_equal(selection.counts.cpu().numpy(), selection.host)
    assert selection.mass is None


def test_a_selection_knows_the_mass_that_is_enough_for_each_sequence():
    layout = BatchLayout.of(16, DEVICE, **columns_of([160, 0, 40]))
    of = (layout, [90, 0, 40], [0.3, 1.0, 1.0])
    assert Selection.of(*of, [None] * 3).mass is None
    selection = Selection.of(*of, [None, 0.9, 0.95])
    assert selection.mass.tolist() == [float("inf"), 0.9, 0.95]
    assert selection.only(2).mass.tolist() == [0.95]
    assert np.array_equal(selection.host, Selection.of(*of).host)


@triton.jit
def _find_kernel(columns, num_seqs, found):
    tile = tl.program_id(0)
    sequence, index = tiles.find_tile(columns, num_seqs, tile)
    tl.store(found + 2 * tile, sequence)
    tl.store(found + 2 * tile + 1, index)


def test_a_kernel_finds_every_tile_s_sequence():
    numbers = random.Random(0)
    for num_rows in ([1], [0, 0, 5], [5, 0, 0], *(random_sizes(numbers) for _ in range(8))):
        layout = BatchLayout.of(16, DEVICE, **columns_of(num_rows))
        expected = [
            [place, tile - sequence.tile_start]
            for place, sequence in layout.sequences()
            for tile, _ in sequence.tiles(16)
        ]
        found = torch.full((layout.num_tiles, 2), -1, dtype=torch.int32, device=DEVICE)
        if expected:
            _find_kernel[(layout.num_tiles,)](layout.columns, layout.num_seqs, found)
        assert found.tolist() == expected
