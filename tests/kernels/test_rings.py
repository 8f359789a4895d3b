# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Which tiles and which memory the kernels for Hopper take, by their own arithmetic in Python.

Gluon has no interpreter. The GPU's answer is in test_hopper.py.
"""

import random

import pytest
import torch

from sparsed_vllm.kernels.layout import FIRST_GEN, BatchLayout, Selection

rings = pytest.importorskip("sparsed_vllm.kernels.rings", reason="this Triton has no Gluon")

scores = pytest.importorskip("sparsed_vllm.kernels.hopper_scores")
ROWS = rings.gl.constexpr(64)


def reached(tiles, start, end, row, column):
    """The tensor's numbers at a tile's rows, in the first column: None where out of bounds.

    As TMA has it: bounds by dimension, and addresses modulo 2**64.
    """
    origin = [int(x) for x in rings._coordinates.fn(start, end, row, column)]
    assert all(-(2**31) <= x < 2**31 for x in origin)
    size = tiles.base.element_size()
    offsets = []
    for i in range(tiles.block_shape[2]):
        place = [origin[0], origin[1], origin[2] + i, origin[3]]
        inside = all(0 <= x < size for x, size in zip(place, tiles.shape, strict=True))
        address = sum(x * stride for x, stride in zip(place, tiles.strides, strict=True)) * size
        offset = (tiles.base.data_ptr() + address) % 2**64 - tiles.base.data_ptr()
        offsets.append(offset // size if inside else None)
    return offsets


@pytest.mark.parametrize("shape", [(1000, 4, 128), (70, 96, 64), (1, 1, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tile_ends_with_its_sequence_and_begins_anywhere_in_it(dtype, shape):
    x = torch.empty(shape, dtype=dtype)
    tiles = rings.tiles_of(x, ROWS.value)
    row_size = x.stride(0)
    for start, end in [(0, shape[0]), (shape[0] // 3, shape[0] // 2 + 1)]:
        for row in range(0, end - start + ROWS.value, ROWS.value):
            for column in (0, (shape[1] - 1) * x.stride(1)):
                rows = range(start + row, start + row + ROWS.value)
                expected = [i * row_size + column if i < end else None for i in rows]
                assert reached(tiles, start, end, row, column) == expected


def test_a_slice_of_a_fused_projection_is_bounded_by_its_own_columns():
    x = torch.empty(100, 12, 64, dtype=torch.bfloat16)[:, 4:8]
    tiles = rings.tiles_of(x, ROWS.value)
    assert tiles.shape[-1] == 4 * 64 and tiles.strides[-2] == 12 * 64
    assert reached(tiles, 10, 90, 64, 192) == [
        (10 + row) * 12 * 64 + 192 if row < 80 else None for row in range(64, 128)
    ]


class InPython:
    """What the functions below use of Gluon."""

    program = 0

    def program_id(self, axis):
        return self.program

    @staticmethod
    def where(condition, a, b):
        return a if condition else b


@pytest.fixture
def gluon(monkeypatch):
    stand_in = InPython()

    def column(columns, num_seqs, number, sequence):
        return int(columns[number.value, sequence])

    for module in (rings, scores):
        monkeypatch.setattr(module, "gl", stand_in)
        monkeypatch.setattr(module, "column", column)
    monkeypatch.setattr(scores, "find_tile", rings.find_tile.fn)
    monkeypatch.setattr(scores, "BLOCK", scores.BLOCK.value)
    return stand_in


def whole_sequences(lengths):
    starts = [2000 * place for place in range(len(lengths))]
    return BatchLayout.of(
        128,
        "cpu",
        query_starts=starts,
        num_rows=lengths,
        first_rows=[0] * len(lengths),
        key_starts=starts,
        key_lens=lengths,
        page_rows=starts,
    )


def batches():
    numbers = random.Random(0)
    yield from ([1], [128], [129], [0, 0, 500], [500, 0, 0])
    for _ in range(200):
        yield [numbers.choice([0, 1, 128, 129, 300, 900]) for _ in range(numbers.randint(1, 20))]


def test_every_tile_is_found_in_its_sequence(gluon):
    for lengths in batches():
        layout = whole_sequences(lengths)
        found = [
            rings.find_tile.fn(layout.columns, layout.num_seqs, tile, 0)
            for tile in range(layout.num_tiles)
        ]
        assert found == [
            (place, tile - sequence.tile_start)
            for place, sequence in layout.sequences()
            for tile, _ in sequence.tiles(128)
        ]


def test_pairs_of_query_blocks_cover_each_sequence_once_and_never_cross_it(gluon):
    for lengths in batches():
        layout = whole_sequences(lengths)
        selection = Selection.of(layout, lengths, [0.3] * len(lengths))
        found = []
        for gluon.program in range(scores.num_pairs(layout)):
            columns = (layout.columns, selection.counts, layout.num_seqs)
            sequence, block, length, count = scores._find_pair.fn(columns)
            assert length == lengths[sequence]
            if block * 128 < length:
                assert count == selection.host[FIRST_GEN, sequence]
                found.append((sequence, block))
            else:
                assert count == 0
        blocks = [(place, range(0, -(-length // 128), 2)) for place, length in enumerate(lengths)]
        assert found == [(place, block) for place, each in blocks for block in each]
