# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gluon, for sm_90: attention of each query block over the key blocks that its list names.

A program takes one tile (128 queries of one head) after another. Its first warps only load: they
keep a ring of key and a ring of value blocks full. Two consumers of four warps hold 64 queries
each and share what is loaded, so that one multiplies while the other exponentiates.

Weights are relative to the largest logit of a list's last block, which comes first, instead of a
maximum that moves: that takes a tenth of the time. Where a later logit lies so far above it that
sums overflow, which they show at their end, the tile is taken again, with a moving maximum. 16-bit
floats of five exponent bits have no such room: their maximum always moves.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
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
LOWEST = gl.constexpr(-3.4028234663852886e38)  # what a maximum is at least
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
    num_programs = min(num_tiles, _num_multiprocessors(q.device))
    overflows = kept.new_empty((num_tiles + num_programs, 2), dtype=torch.int32)
    _block_sparse_attention_kernel[(num_programs,)](
        *(tiles_of(x, rows) for x, rows in ((q, ROWS), (k, BLOCK), (v, BLOCK), (out, ROWS))),
        *(lse, kept, num_kept, rows, overflows),
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
    do_not_specialize_on_alignment=[
        *("lse_ptr", "kept_ptr", "num_kept_ptr", "rows_ptr", "overflow_ptr")
    ],
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
    overflow_ptr,
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
    find most of them in the cache. overflow_ptr: int32 [num_tiles + num_programs, 2], whether half
    of a tile has overflowed, and how many of a program have.
    """
    q_ring = make_ring(2 * STAGES, q_tiles, 1)
    k_ring = make_ring(STAGES, k_tiles, 2)
    v_ring = make_ring(STAGES, v_tiles, 2)
    seen_once = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(seen_once, count=2)
    fence_async_shared()
    rings = (q_ring, k_ring, v_ring)
    lists = (kept_ptr, num_kept_ptr, rows_ptr, kept_row, kept_head, num_row, num_head)
    tiles = (num_q_blocks, num_tiles, overflow_ptr, seen_once)
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
    """The producer."""
    num_q_blocks, num_tiles, overflow_ptr, seen_once = tiles
    step = 0  # blocks so far
    turn = 0  # halves of tiles so far
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        step = _load_tile(rings, lists, inputs, num_q_blocks, tile, turn, step)
        turn += 2
    mbarrier.wait(seen_once, 0)
    if _has_overflowed(overflow_ptr, num_tiles + gl.program_id(0)):
        for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
            if _has_overflowed(overflow_ptr, tile):
                step = _load_tile(rings, lists, inputs, num_q_blocks, tile, turn, step)
                turn += 2


@gluon.jit
def _load_tile(rings, lists, inputs, num_q_blocks, tile, turn, step):
    """A list's last block comes first, values one block behind keys. Returns the next step."""
    q_ring, k_ring, v_ring = rings
    q_tiles, k_tiles, v_tiles, q_head, k_head, v_head, group = inputs
    head = tile // num_q_blocks
    k_column = head // group * k_head
    v_column = head // group * v_head
    ids, count, block = _list_of(tile, num_q_blocks, lists)
    fill(k_ring, step, k_tiles, block * BLOCK, k_column)
    for half in gl.static_range(2):
        row = tile % num_q_blocks * BLOCK + half * ROWS
        fill(q_ring, turn + half, q_tiles, row, head * q_head)
    for i in range(1, count):
        following = gl.load(ids + i - 1).to(gl.int32)
        fill(k_ring, step + 1, k_tiles, following * BLOCK, k_column)
        fill(v_ring, step, v_tiles, block * BLOCK, v_column)
        block = following
        step += 1
    fill(v_ring, step, v_tiles, block * BLOCK, v_column)
    return step + 1


@gluon.jit
def _has_overflowed(overflow_ptr, row):
    """Whether either half of a tile has, or of a program's."""
    first = gl.load(overflow_ptr + 2 * row, volatile=True)
    return first + gl.load(overflow_ptr + 2 * row + 1, volatile=True) > 0


@gluon.jit
def _attend_tiles(rings, lists, tiles, outputs, length, scale_log2, HALF: gl.constexpr):
    """A consumer. What overflows is not written the first time, and nothing else the second."""
    q_ring, k_ring, v_ring = rings
    num_q_blocks, num_tiles, overflow_ptr, seen_once = tiles
    blocks = (k_ring, v_ring, lists, num_q_blocks, length, scale_log2)
    step = 0
    turn = HALF
    overflows = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        q = filled(q_ring, turn)
        acc, peak, total, step = _attend_tile(q, blocks, tile, step, q.dtype == gl.float16)
        overflow = _overflow(acc, total)
        gl.store(overflow_ptr + 2 * tile + HALF, overflow)
        if overflow == 0:
            _store_tile(outputs, q, acc, peak, total, tile, num_q_blocks, HALF, length)
        release(q_ring, turn)
        overflows += overflow
        turn += 2
    gl.store(overflow_ptr + 2 * (num_tiles + gl.program_id(0)) + HALF, overflows)
    mbarrier.arrive(seen_once, count=1)
    mbarrier.wait(seen_once, 0)
    if _has_overflowed(overflow_ptr, num_tiles + gl.program_id(0)):
        for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
            if _has_overflowed(overflow_ptr, tile):
                q = filled(q_ring, turn)
                acc, peak, total, step = _attend_tile(q, blocks, tile, step, True)
                if gl.load(overflow_ptr + 2 * tile + HALF, volatile=True) > 0:
                    _store_tile(outputs, q, acc, peak, total, tile, num_q_blocks, HALF, length)
                release(q_ring, turn)
                turn += 2


@gluon.jit
def _attend_tile(q, blocks, tile, step, MOVING: gl.constexpr):
    """Sums of weighted values, what weights are relative to, their sums, and the next step.

    Only a list's last block can be partial: it comes first, outside of the loop. In the loop the
    values of one block are multiplied while the next one's weights are found.
    MOVING: weights are relative to the largest logit so far, not to the first block's
    """
    k_ring, v_ring, lists, num_q_blocks, length, scale_log2 = blocks
    HEAD_DIM: gl.constexpr = q.shape[1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    OF_SUM: gl.constexpr = gl.SliceLayout(1, SUMS)
    nothing = gl.zeros([ROWS, BLOCK], gl.float32, LOGITS)
    _, count, block = _list_of(tile, num_q_blocks, lists)
    k = filled(k_ring, step).permute((1, 0))
    logits = warpgroup_mma(q, k, nothing, use_acc=False)
    release(k_ring, step)
    lanes = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LOGITS))
    end = gl.where(count > 0, length - block * BLOCK, 0)
    logits = gl.where(gl.expand_dims(lanes < end, 0), logits, float("-inf"))
    lowest = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, LOGITS))
    peak = _peak(logits, lowest, scale_log2)
    weights = _weigh(logits, peak, scale_log2)
    total = gl.sum(weights, 1)
    weights = gl.convert_layout(weights.to(q.dtype), WEIGHTS)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, SUMS)
    for _ in range(1, count):
        k = filled(k_ring, step + 1).permute((1, 0))
        logits = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        v = filled(v_ring, step)
        acc = warpgroup_mma(weights, v, acc, is_async=True)
        logits = warpgroup_mma_wait(1, [logits])
        release(k_ring, step + 1)
        former = peak
        if MOVING:
            peak = _peak(logits, former, scale_log2)
            total *= gl.exp2(former - peak)
        new_weights = _weigh(logits, peak, scale_log2)
        total += gl.sum(new_weights, 1)
        acc = warpgroup_mma_wait(0, [acc])
        release(v_ring, step)
        # Not before the wait: the product still reads the former weights' registers.
        weights = gl.convert_layout(new_weights.to(q.dtype), WEIGHTS)
        if MOVING:
            acc *= gl.expand_dims(gl.convert_layout(gl.exp2(former - peak), OF_SUM), 1)
        step += 1
    acc = warpgroup_mma(weights, filled(v_ring, step), acc)
    release(v_ring, step)
    return acc, peak, total, step + 1


@gluon.jit
def _peak(logits, former, scale_log2):
    """Of raw products, so that the scaling fuses with the subtraction."""
    return gl.maximum(former, gl.max(logits, 1) * scale_log2)


@gluon.jit
def _weigh(logits, peak, scale_log2):
    return gl.exp2(logits * scale_log2 - gl.expand_dims(peak, 1))


@gluon.jit
def _overflow(acc, total):
    """1 if a sum is infinite or no number, else 0."""
    finite = gl.min((gl.abs(acc) < float("inf")).to(gl.int32), 1)
    known = gl.convert_layout((total < float("inf")).to(gl.int32), finite.type.layout)
    return 1 - gl.min(finite & known, 0)


@gluon.jit
def _store_tile(outputs, memory, acc, peak, total, tile, num_q_blocks, HALF: gl.constexpr, length):
    """Writes half a tile and its log-sum-exp; returns once `memory` is free again.

    memory: the tile's queries, which all have been read
    """
    out_tiles, lse_ptr, out_head, lse_head = outputs
    seen = gl.convert_layout(total, gl.SliceLayout(1, acc.type.layout))
    seen = gl.expand_dims(seen, 1)
    result = gl.where(seen == 0, 0.0, acc / seen)
    row = tile % num_q_blocks * BLOCK + HALF * ROWS
    head = tile // num_q_blocks
    memory.store(result.to(memory.dtype))
    fence_async_shared()
    store(out_tiles, [row, head * out_head], memory)
    if lse_ptr is not None:
        rows = row + gl.arange(0, ROWS, layout=peak.type.layout)
        lse = lse_ptr + head.to(gl.int64) * lse_head + rows
        gl.store(lse, (peak + gl.log2(total)) * LN_2, mask=rows < length)
    tma.store_wait(0)
