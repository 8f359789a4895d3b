# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gluon, for sm_90: rings of tiles in shared memory, which one warp group fills and others read."""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.8 renamed them, 3.9 dropped the older names.
_has_new_names = hasattr(tma, "async_load")
_load = tma.async_load if _has_new_names else tma.async_copy_global_to_shared
store = tma.async_store if _has_new_names else tma.async_copy_shared_to_global


def tiles_of(x: Tensor, rows: gl.constexpr) -> TensorDescriptor:
    """Of `rows` tokens of one head, out of x [tokens, heads, head_dim] as [tokens, columns]."""
    tokens, heads, head_dim = x.shape
    shape = [tokens, (heads - 1) * x.stride(1) + head_dim]
    tile = (rows.value, head_dim)
    return TensorDescriptor(x, shape, [x.stride(0), 1], list(tile), _layout(tile, x.dtype))


@cache
def _layout(tile: tuple[int, int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of a tile in shared memory; to find it takes Triton as long as the rest of a launch."""
    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for(list(tile), kind)


@gluon.jit
def make_ring(PLACES: gl.constexpr, tiles, CONSUMERS: gl.constexpr):
    """Room for PLACES tiles and, of each place, whether it is full and whether it is free."""
    shape: gl.constexpr = [PLACES, tiles.block_shape[0], tiles.block_shape[1]]
    memory = gl.allocate_shared_memory(tiles.dtype, shape, tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(free.index(place), count=CONSUMERS)
    return memory, full, free


@gluon.jit
def fill(ring, step, tiles, row, column):
    """Loads the ring's step-th tile as soon as there is room."""
    memory, full, free = ring
    place = step % memory.shape[0]
    mbarrier.wait(free.index(place), (step // memory.shape[0] & 1) ^ 1)
    mbarrier.expect(full.index(place), tiles.block_type.nbytes)
    _load(tiles, [row, column], full.index(place), memory.index(place))


@gluon.jit
def filled(ring, step):
    """The ring's step-th tile, once it is there."""
    memory, full, _ = ring
    place = step % memory.shape[0]
    mbarrier.wait(full.index(place), step // memory.shape[0] & 1)
    return memory.index(place)


@gluon.jit
def release(ring, step):
    """Makes room: this consumer is done with the ring's step-th tile."""
    memory, _, free = ring
    mbarrier.arrive(free.index(step % memory.shape[0]), count=1)
