# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gluon, for sm_90: attention of each query block over the key blocks that its list names.

A program takes one tile (128 queries of one head) after another. Its first warps only load: they
keep a ring of key and a ring of value blocks full. Two consumers of four warps hold 64 queries
each and share what is loaded, so that one multiplies while the other exponentiates.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsed_vllm.kernels.layout import QueryBlocks
from sparsed_vllm.kernels.reference import empty_attention
from sparsed_vllm.kernels.rings import fill, filled, make_ring, release, store, tiles_of

BLOCK = gl.constexpr(128)  # queries of a tile, keys of a step
ROWS = gl.constexpr(64)  # queries of a consumer
STAGES = gl.constexpr(2)  # of each ring: all that fits into shared memory
REGISTERS = gl.constexpr(240)  # of a consumer's thread
LOWEST = gl.constexpr(-3.4028234663852886e38)  # where a running maximum begins
LN_2 = gl.constexpr(0.6931471805599453)
LOG2_E = 1.4426950408889634


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: QueryBlocks,
    kept: Tensor,
    num_kept: Tensor,
    rows: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See reference.block_sparse_attention.

    16 bits a number, heads of 64 or 128, blocks of 128; base and strides aligned to 16 bytes
    """
    assert scale > 0, "the maximum is taken before scaling"
    out, lse = empty_attention(q, out, return_lse)
    for span, places in blocks.by_span():
        tokens = slice(span.first, span.first + span.length)
        queries = span.query_rows
        part = None if lse is None else lse[:, tokens]
        table = (kept, num_kept, rows[places])
        _attend_in_sequence(q[queries], k[tokens], v[tokens], out[queries], part, *table, scale)
    return out if lse is None else (out, lse)


def _attend_in_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    kept: Tensor,
    num_kept: Tensor,
    rows: Tensor,
    scale: float,
) -> None:
    """One launch for one sequence: what lies past its end reads as zeros, and is not written.

    q, out [rows of its query blocks, ...];  k, v [its tokens, ...]
    """
    num_tiles = rows.shape[0] * q.shape[1]
    _block_sparse_attention_kernel[(min(num_tiles, _num_multiprocessors(q.device)),)](
        *(tiles_of(x, rows) for x, rows in ((q, ROWS), (k, BLOCK), (v, BLOCK), (out, ROWS))),
        *(lse, kept, num_kept, rows),
        *(k.shape[0], rows.shape[0], num_tiles, scale * LOG2_E),
        *(x.stride(1) for x in (q, k, v, out)),
        0 if lse is None else lse.stride(0),
        *(stride for x in (kept, num_kept) for stride in x.stride()[:2]),
        q.shape[1] // k.shape[1],
        num_warps=4,
    )


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# Nothing depends on what divides these, and each would be compiled for anew.
_ANY_VALUE = [
    *("length", "num_q_blocks", "num_tiles", "lse_head"),
    *("q_head", "k_head", "v_head", "out_head"),
    *("kept_row", "kept_head", "num_row", "num_head", "group"),
]


@gluon.jit(
    do_not_specialize=_ANY_VALUE,
    do_not_specialize_on_alignment=["lse_ptr", "kept_ptr", "num_kept_ptr", "rows_ptr"],
)
def _block_sparse_attention_kernel(
    q_tiles,
    k_tiles,
    v_tiles,
    out_tiles,
    lse_ptr,
    kept_ptr,
    num_kept_ptr,
    rows_ptr,
    length,
    num_q_blocks,
    num_tiles,
    scale_log2,
    q_head,
    k_head,
    v_head,
    out_head,
    lse_head,
    kept_row,
    kept_head,
    num_row,
    num_head,
    group,
):
    """Each program takes every num_programs-th tile; x_head: columns from head to head.

    The tiles of a head are taken together: with ascending lists they sweep its keys in step, and
    find most of them in the cache.
    """
    q_ring = make_ring(2 * STAGES, q_tiles, 1)
    k_ring = make_ring(STAGES, k_tiles, 2)
    v_ring = make_ring(STAGES, v_tiles, 2)
    fence_async_shared()
    rings = (q_ring, k_ring, v_ring)
    lists = (kept_ptr, num_kept_ptr, rows_ptr, kept_row, kept_head, num_row, num_head)
    tiles = (num_q_blocks, num_tiles)
    inputs = (q_tiles, k_tiles, v_tiles, q_head, k_head, v_head, group)
    outputs = (out_tiles, lse_ptr, out_head, lse_head)
    gl.warp_specialize(
        [
            (_load_tiles, (rings, lists, tiles, inputs)),
            (_attend_tiles, (rings, lists, tiles, outputs, length, scale_log2, 0)),
            (_attend_tiles, (rings, lists, tiles, outputs, length, scale_log2, 1)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


@gluon.jit
def _list_of(tile, num_q_blocks, lists):
    """Where a tile's list begins, its length, and its last block: block 0 if it is empty."""
    kept_ptr, num_kept_ptr, rows_ptr, kept_row, kept_head, num_row, num_head = lists
    head = tile // num_q_blocks
    row = gl.load(rows_ptr + tile % num_q_blocks)
    ids = kept_ptr + row * kept_row + head * kept_head
    count = gl.load(num_kept_ptr + row * num_row + head * num_head)
    last = 0
    if count > 0:
        last = gl.load(ids + count - 1).to(gl.int32)
    return ids, count, last


@gluon.jit
def _load_tiles(rings, lists, tiles, inputs):
    """The producer. A list's last block comes first, values one block behind keys."""
    q_ring, k_ring, v_ring = rings
    num_q_blocks, num_tiles = tiles
    q_tiles, k_tiles, v_tiles, q_head, k_head, v_head, group = inputs
    step = 0  # blocks so far
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head = tile // num_q_blocks
        k_column = head // group * k_head
        v_column = head // group * v_head
        ids, count, block = _list_of(tile, num_q_blocks, lists)
        fill(k_ring, step, k_tiles, block * BLOCK, k_column)
        for half in gl.static_range(2):
            turn = 2 * (tile // gl.num_programs(0)) + half
            row = tile % num_q_blocks * BLOCK + half * ROWS
            fill(q_ring, turn, q_tiles, row, head * q_head)
        for i in range(1, count):
            following = gl.load(ids + i - 1).to(gl.int32)
            fill(k_ring, step + 1, k_tiles, following * BLOCK, k_column)
            fill(v_ring, step, v_tiles, block * BLOCK, v_column)
            block = following
            step += 1
        fill(v_ring, step, v_tiles, block * BLOCK, v_column)
        step += 1


@gluon.jit
def _attend_tiles(rings, lists, tiles, outputs, length, scale_log2, HALF: gl.constexpr):
    """A consumer. Only a list's last block can be partial: it comes first, outside of the loop.

    In the loop the values of one block are multiplied while the next one's weights are found.
    """
    q_ring, k_ring, v_ring = rings
    num_q_blocks, num_tiles = tiles
    HEAD_DIM: gl.constexpr = q_ring[0].shape[2]
    KIND: gl.constexpr = q_ring[0].dtype
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    OF_SUM: gl.constexpr = gl.SliceLayout(1, SUMS)
    lanes = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LOGITS))
    nothing = gl.zeros([ROWS, BLOCK], gl.float32, LOGITS)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        _, count, block = _list_of(tile, num_q_blocks, lists)
        turn = 2 * (tile // gl.num_programs(0)) + HALF
        q = filled(q_ring, turn)
        k = filled(k_ring, step).permute((1, 0))
        logits = warpgroup_mma(q, k, nothing, use_acc=False)
        release(k_ring, step)
        end = gl.where(count > 0, length - block * BLOCK, 0)
        logits = gl.where(gl.expand_dims(lanes < end, 0), logits, float("-inf"))
        peak = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, LOGITS))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
        weights, decay, peak, total = _weigh(logits, peak, total, scale_log2)
        weights = gl.convert_layout(weights.to(KIND), WEIGHTS)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, SUMS)
        for _ in range(1, count):
            k = filled(k_ring, step + 1).permute((1, 0))
            logits = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            v = filled(v_ring, step)
            acc = warpgroup_mma(weights, v, acc, is_async=True)
            logits = warpgroup_mma_wait(1, [logits])
            release(k_ring, step + 1)
            new_weights, decay, peak, total = _weigh(logits, peak, total, scale_log2)
            acc = warpgroup_mma_wait(0, [acc])
            release(v_ring, step)
            # Not before the wait: the product still reads the former weights' registers.
            weights = gl.convert_layout(new_weights.to(KIND), WEIGHTS)
            acc = acc * gl.expand_dims(gl.convert_layout(decay, OF_SUM), 1)
            step += 1
        acc = warpgroup_mma(weights, filled(v_ring, step), acc)
        release(v_ring, step)
        step += 1

        seen = gl.expand_dims(gl.convert_layout(total, OF_SUM), 1)
        result = gl.where(seen == 0, 0.0, acc / seen)
        row = tile % num_q_blocks * BLOCK + HALF * ROWS
        _store_tile(outputs, q, result, peak, total, row, tile // num_q_blocks, length)
        release(q_ring, turn)


@gluon.jit
def _weigh(logits, peak, total, scale_log2):
    """One step of the online softmax: weights, and what earlier sums shrink by.

    The maximum is taken of raw products, so that the scaling fuses with the subtraction.
    """
    new_peak = gl.maximum(peak, gl.max(logits, 1) * scale_log2)
    weights = gl.exp2(logits * scale_log2 - gl.expand_dims(new_peak, 1))
    decay = gl.exp2(peak - new_peak)
    return weights, decay, new_peak, total * decay + gl.sum(weights, 1)


@gluon.jit
def _store_tile(outputs, memory, result, peak, total, row, head, length):
    """Writes result [ROWS, head_dim] and its log-sum-exp; returns once `memory` is free again.

    memory: the tile's queries, which all have been read
    """
    out_tiles, lse_ptr, out_head, lse_head = outputs
    memory.store(result.to(memory.dtype))
    fence_async_shared()
    store(out_tiles, [row, head * out_head], memory)
    if lse_ptr is not None:
        rows = row + gl.arange(0, ROWS, layout=peak.type.layout)
        lse = lse_ptr + head.to(gl.int64) * lse_head + rows
        gl.store(lse, (peak + gl.log2(total)) * LN_2, mask=rows < length)
    tma.store_wait(0)
