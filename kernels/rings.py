# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the Gluon kernels for sm_90 share: tiles of sequences, and rings of them in shared memory.

One warp group fills a ring by TMA, others read it. TMA's own bounds check ends a tile where its
sequence ends: rows behind read as zeros and are not written. The descriptor is that of
triton.tools.ragged_tma. Row r of a sequence [start, end) has the coordinate 2**30 - (end - start)
+ r in a dimension of size 2**30, so that the first row out of bounds is the sequence's end. Two
more dimensions make the address right: `end` rows on, and 2**30 rows back, by 2**30 steps of
2**34 - s numbers, for s numbers a row: at two bytes a number, 2**30 * 2**34 of them are 0 modulo
2**64.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsed_vllm.kernels.tiles import TILE_START

# Triton 3.8 renamed them, 3.9 dropped the older names.
_has_new_names = hasattr(tma, "async_load")
_load = tma.async_load if _has_new_names else tma.async_copy_global_to_shared
_store = tma.async_store if _has_new_names else tma.async_copy_shared_to_global

BILLION = gl.constexpr(1 << 30)  # the size of the dimension of rows
ANY_SIZE = 0x7FFF0000


def tiles_of(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` tokens of one head, out of x [tokens, heads, head_dim].

    A head begins in column head * stride(1). x has 16 bits a number and begins at a multiple of 16
    bytes.
    """
    tiles = object.__new__(TensorDescriptor)
    vars(tiles).update(_description(x.dtype, *x.shape[1:], *x.stride()[:2], rows), base=x)
    return tiles


@cache
def _description(
    dtype: torch.dtype, heads: int, head_dim: int, stride: int, head_stride: int, rows: int
) -> dict[str, Any]:
    """All of such tiles but their base.

    Cached: Triton takes longer to check it, and to find the layout, than to launch a kernel.
    stride, head_stride: numbers from a token to the next, and from a head
    """
    shape = [ANY_SIZE, ANY_SIZE, BILLION.value, (heads - 1) * head_stride + head_dim]
    strides = [(1 << 34) - stride, stride, stride, 1]
    tile = [1, 1, rows, head_dim]
    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    layout = gl.NVMMASharedLayout.get_default_for(tile, kind)
    anything = torch.empty(0, dtype=dtype)
    return vars(TensorDescriptor(anything, shape, strides, tile, layout))


@gluon.jit
def column(columns, num_seqs, NUMBER: gl.constexpr, sequence):
    """One number of a layout, or of a selection: NUMBER is the column."""
    return gl.load(columns + NUMBER * num_seqs + sequence)


@gluon.jit
def find_tile(columns, num_seqs, tile, GAP: gl.constexpr):
    """The sequence that a tile belongs to, and the tile's index in it.

    GAP: how many tiles the numbering leaves out between one sequence and the next; the index of
    such a tile is past the end of the sequence before it
    """
    low = tile * 0
    high = low + num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        begun = column(columns, num_seqs, TILE_START, middle) + middle * GAP <= tile
        low = gl.where(begun, middle, low)
        high = gl.where(begun, high, middle - 1)
    return low, tile - column(columns, num_seqs, TILE_START, low) - low * GAP


@gluon.jit
def make_ring(PLACES: gl.constexpr, tiles, CONSUMERS: gl.constexpr, PARTS: gl.constexpr = 1):
    """Room for PLACES tiles, and two barriers for each: that it is full, and that it is free.

    A tile of the ring is PARTS of the descriptor's, one below the other.
    """
    shape: gl.constexpr = [PLACES, 1, 1, PARTS * tiles.block_shape[2], tiles.block_shape[3]]
    memory = gl.allocate_shared_memory(tiles.dtype, shape, tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(free.index(place), count=CONSUMERS)
    return memory, full, free


@gluon.jit
def fill(ring, step, tiles, start, end, row, column):
    """Loads the ring's step-th tile as soon as there is room.

    It begins in `row` of the sequence that has the tensor's rows [start, end).
    """
    fill_parts(ring, step, tiles, start, end, (row,), column)


@gluon.jit
def fill_parts(ring, step, tiles, start, end, rows, column):
    """The same for a tile of several parts, each of which begins in a row of its own.

    A part in which the sequence has no row reads as zeros.
    """
    memory, full, free = ring
    PARTS: gl.constexpr = len(rows)
    HEIGHT: gl.constexpr = tiles.block_shape[2]
    place = step % memory.shape[0]
    mbarrier.wait(free.index(place), (step // memory.shape[0] & 1) ^ 1)
    mbarrier.expect(full.index(place), PARTS * tiles.block_type.nbytes)
    for part in gl.static_range(PARTS):
        target = memory.index(place).slice(part * HEIGHT, HEIGHT, 2)
        where = _coordinates(start, end, rows[part], column)
        _load(tiles, where, full.index(place), target)


@gluon.jit
def _coordinates(start, end, row, column):
    """Of a row of the sequence [start, end): rows from its end on are out of bounds."""
    return BILLION, end, BILLION - (end - start) + row, column


@gluon.jit
def filled(ring, step):
    """The ring's step-th tile, once it is there: [rows, head_dim]."""
    _, full, _ = ring
    place = step % full.shape[0]
    mbarrier.wait(full.index(place), step // full.shape[0] & 1)
    return tile_at(ring, place)


@gluon.jit
def tile_at(ring, place):
    memory, _, _ = ring
    return memory.index(place).reshape([memory.shape[3], memory.shape[4]])


@gluon.jit
def release(ring, step):
    """Makes room: this consumer is done with the ring's step-th tile."""
    memory, _, free = ring
    mbarrier.arrive(free.index(step % memory.shape[0]), count=1)


@gluon.jit
def store(tiles, start, end, row, column, memory):
    """Writes a tile [rows, head_dim] in shared memory; places as in `fill`."""
    _store(tiles, _coordinates(start, end, row, column), memory.reshape(tiles.block_shape))
