# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gluon, for sm_90: attention of each query block over the key blocks that its list names.

A persistent program computes one tile (128 query rows of one head) after another, 128 keys a step:
one key block, or several smaller ones that lie below each other in shared memory. Its first four
warps only load: they keep a ring of keys and one of values full by TMA, a copy for each block. Two
consumers of four warps hold 64 query rows each and share the keys: one computes exponentials while
the other has the tensor cores.

Weights are relative to a fixed reference: the largest logit of the list's last step, which is
taken first. A running maximum makes every weight of a block wait for all of the block's logits;
without it a launch takes 7 to 13% less time. A later logit may lie so far above the reference that
sums overflow. They are then infinite or NaN at the tile's end, and the tile is computed again with
a running maximum. A weight in float16 overflows beyond 65504: there the maximum always runs.
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

from sparsed_vllm.kernels.layout import BatchLayout, BlockTables
from sparsed_vllm.kernels.reference import empty_attention
from sparsed_vllm.kernels.relaunch import relaunch
from sparsed_vllm.kernels.rings import (
    column,
    fill,
    fill_parts,
    filled,
    find_tile,
    make_ring,
    release,
    store,
    tiles_of,
)
from sparsed_vllm.kernels.tiles import (
    FIRST_ROW,
    KEY_LEN,
    KEY_START,
    LN_2,
    LOG2_E,
    LOWEST,
    NUM_ROWS,
    PAGE,
    PAGE_ROW,
    QUERY_START,
)

BLOCK = gl.constexpr(128)  # query rows of a tile, keys of a step
ROWS = gl.constexpr(64)  # query rows of a consumer
STAGES = gl.constexpr(2)  # of each ring: three do not fit into shared memory with heads of 128
REGISTERS = gl.constexpr(240)  # of a consumer's thread


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    tables: BlockTables,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See reference.block_sparse_attention.

    16 bits a number, heads of 64 or 128, query blocks of 128; base and strides aligned to 16 bytes
    """
    assert scale > 0, "the maximum is taken before scaling"
    out, lse = empty_attention(q, out, return_lse)
    num_tiles = layout.num_tiles * q.shape[1]
    num_programs = min(num_tiles, _num_multiprocessors(q.device))
    overflows = q.new_empty((num_tiles + num_programs, 2), dtype=torch.int32)
    if num_tiles:
        relaunch(
            _block_sparse_attention_kernel,
            (num_programs, 1, 1),
            (q.device, q.dtype, q.shape[2], layout.block_size, tables.kept.dtype, lse is None),
            tiles_of(q, ROWS.value),
            tiles_of(k, layout.block_size),
            tiles_of(v, layout.block_size),
            tiles_of(out, ROWS.value),
            lse,
            layout.columns,
            layout.num_seqs,
            tables.kept,
            tables.num_kept,
            tables.pages,
            overflows,
            layout.num_tiles,
            num_tiles,
            scale * LOG2_E.value,
            q.stride(1),
            k.stride(1),
            v.stride(1),
            out.stride(1),
            q.shape[0],
            tables.kept.stride(0),
            tables.kept.stride(2),
            tables.num_kept.stride(0),
            tables.num_kept.stride(2),
            tables.pages.stride(0),
            q.shape[1] // k.shape[1],
        )
    return out if lse is None else (out, lse)


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# Nothing depends on what divides these, and each would be compiled for anew.
@gluon.jit(
    do_not_specialize=[
        "num_seqs",
        "num_q_blocks",
        "num_tiles",
        "q_head",
        "k_head",
        "v_head",
        "out_head",
        "lse_head",
        "kept_page",
        "kept_head",
        "num_page",
        "num_head",
        "page_row",
        "group",
    ],
    do_not_specialize_on_alignment=[
        "lse_ptr",
        "columns",
        "kept_ptr",
        "num_kept_ptr",
        "pages_ptr",
        "overflow_ptr",
    ],
)
def _block_sparse_attention_kernel(
    q_tiles,
    k_tiles,
    v_tiles,
    out_tiles,
    lse_ptr,
    columns,
    num_seqs,
    kept_ptr,
    num_kept_ptr,
    pages_ptr,
    overflow_ptr,
    num_q_blocks,
    num_tiles,
    scale_log2,
    q_head,
    k_head,
    v_head,
    out_head,
    lse_head,
    kept_page,
    kept_head,
    num_page,
    num_head,
    page_row,
    group,
):
    """Each program computes every num_programs-th tile.

    The tiles of a head run together: with ascending lists they sweep its keys in step, and find
    most of them in the L2 cache.

    num_q_blocks: tiles of a head;  num_tiles: of all heads;  x_head: stride from head to head
    overflow_ptr: int32 [num_tiles + num_programs, 2], for each half: whether it has overflowed in
    a tile, then in how many of a program's tiles
    """
    q_ring = make_ring(2 * STAGES, q_tiles, 1)
    PARTS: gl.constexpr = BLOCK // k_tiles.block_shape[2]
    k_ring = make_ring(STAGES, k_tiles, 2, PARTS)
    v_ring = make_ring(STAGES, v_tiles, 2, PARTS)
    seen_once = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(seen_once, count=2)
    fence_async_shared()
    rings = (q_ring, k_ring, v_ring)
    layout = (columns, num_seqs, num_q_blocks)
    lists = (kept_ptr, num_kept_ptr, pages_ptr, kept_page, kept_head, num_page, num_head, page_row)
    work = (num_tiles, overflow_ptr, seen_once)
    inputs = (q_tiles, k_tiles, v_tiles, q_head, k_head, v_head, group)
    outputs = (out_tiles, lse_ptr, out_head, lse_head)
    gl.warp_specialize(
        [
            (_load_tiles, (rings, layout, lists, work, inputs, PARTS)),
            (_attend_tiles, (rings, layout, lists, work, outputs, scale_log2, 0, PARTS)),
            (_attend_tiles, (rings, layout, lists, work, outputs, scale_log2, 1, PARTS)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


@gluon.jit
def _find(tile, layout):
    """A tile's head, its sequence, and its index among that sequence's tiles."""
    columns, num_seqs, num_q_blocks = layout
    sequence, index = find_tile(columns, num_seqs, tile % num_q_blocks, 0)
    return tile // num_q_blocks, sequence, index


@gluon.jit
def _list_of(head, sequence, index, layout, lists):
    """A tile's list: a pointer to its ids, their number, and the last id; 0 if it is empty."""
    columns, num_seqs, _ = layout
    kept_ptr, num_kept_ptr, pages_ptr, kept_page, kept_head, num_page, num_head, page_row = lists
    gl.static_assert(BLOCK == PAGE)
    block = column(columns, num_seqs, FIRST_ROW, sequence) // BLOCK + index
    row = column(columns, num_seqs, PAGE_ROW, sequence).to(gl.int64)
    page = gl.load(pages_ptr + row * page_row + block).to(gl.int64)
    ids = kept_ptr + page * kept_page + head * kept_head
    count = gl.load(num_kept_ptr + page * num_page + head * num_head).to(gl.int32)
    last = 0
    if count > 0:
        last = gl.load(ids + count - 1).to(gl.int32)
    return ids, count, last


@gluon.jit
def _load_tiles(rings, layout, lists, work, inputs, PARTS: gl.constexpr):
    """The producer. The second loop serves the consumers' second pass over overflowed tiles."""
    num_tiles, overflow_ptr, seen_once = work
    step = 0  # of 128 keys, so far
    turn = 0  # halves of tiles so far
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        step = _load_tile(rings, layout, lists, inputs, tile, turn, step, PARTS)
        turn += 2
    mbarrier.wait(seen_once, 0)
    if _has_overflowed(overflow_ptr, num_tiles + gl.program_id(0)):
        for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
            if _has_overflowed(overflow_ptr, tile):
                step = _load_tile(rings, layout, lists, inputs, tile, turn, step, PARTS)
                turn += 2


@gluon.jit
def _load_tile(rings, layout, lists, inputs, tile, turn, step, PARTS: gl.constexpr):
    """Loads a tile's queries, and its blocks in the consumers' order. Returns the next step.

    PARTS blocks of a list are one step. The list's last step comes first, and may have fewer;
    values follow their keys one step later.
    """
    q_ring, k_ring, v_ring = rings
    columns, num_seqs, _ = layout
    q_tiles, k_tiles, v_tiles, q_head, k_head, v_head, group = inputs
    head, sequence, index = _find(tile, layout)
    k_column = head // group * k_head
    v_column = head // group * v_head
    key_start = column(columns, num_seqs, KEY_START, sequence)
    key_end = key_start + column(columns, num_seqs, KEY_LEN, sequence)
    ids, count, _ = _list_of(head, sequence, index, layout, lists)
    place = gl.maximum(count - 1, 0) // PARTS * PARTS
    keys = (k_ring, k_tiles, k_column)
    values = (v_ring, v_tiles, v_column)
    listed = (ids, count, key_start, key_end)
    _fill_step(keys, step, listed, place, PARTS)
    start = column(columns, num_seqs, QUERY_START, sequence)
    end = start + column(columns, num_seqs, NUM_ROWS, sequence)
    for half in gl.static_range(2):
        row = index * BLOCK + half * ROWS
        fill(q_ring, turn + half, q_tiles, start, end, row, head * q_head)
    for following in range(0, place, PARTS):
        _fill_step(keys, step + 1, listed, following, PARTS)
        _fill_step(values, step, listed, place, PARTS)
        place = following
        step += 1
    _fill_step(values, step, listed, place, PARTS)
    return step + 1


@gluon.jit
def _fill_step(into, step, listed, place, PARTS: gl.constexpr):
    """Loads PARTS blocks of a list, from its place-th on; those behind its end read as zeros.

    Ids are read anew for the values: kept since their keys, they outgrow the loader's registers.
    """
    ring, tiles, column = into
    ids, count, start, end = listed
    # Past every sequence's end: there are fewer ids than that.
    NO_BLOCK: gl.constexpr = 32767 if ids.dtype.element_ty == gl.int16 else 1 << 22
    rows = ()
    for part in gl.static_range(PARTS):
        block = gl.load(ids + place + part, mask=place + part < count, other=NO_BLOCK)
        rows += (block.to(gl.int32) * tiles.block_shape[2],)  # type: ignore[assignment]
    fill_parts(ring, step, tiles, start, end, rows, column)


@gluon.jit
def _has_overflowed(overflow_ptr, row):
    """Whether either half of a tile has, or of any tile of a program."""
    first = gl.load(overflow_ptr + 2 * row, volatile=True)
    return first + gl.load(overflow_ptr + 2 * row + 1, volatile=True) > 0


@gluon.jit
def _attend_tiles(
    rings, layout, lists, work, outputs, scale_log2, HALF: gl.constexpr, PARTS: gl.constexpr
):
    """A consumer. Its second pass computes the tiles in which either half has overflowed.

    An overflowed half is not written in the first pass, and only such a half in the second.
    """
    q_ring, k_ring, v_ring = rings
    num_tiles, overflow_ptr, seen_once = work
    keys = (k_ring, v_ring, lists, scale_log2)
    step = 0
    turn = HALF
    overflows = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        q = filled(q_ring, turn)
        moving: gl.constexpr = q.dtype == gl.float16
        acc, peak, total, step = _attend_tile(q, layout, keys, tile, step, moving, PARTS)
        overflow = _overflow(acc, total)
        gl.store(overflow_ptr + 2 * tile + HALF, overflow)
        if overflow == 0:
            _store_tile(outputs, layout, q, acc, peak, total, tile, HALF)
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
                acc, peak, total, step = _attend_tile(q, layout, keys, tile, step, True, PARTS)
                if gl.load(overflow_ptr + 2 * tile + HALF, volatile=True) > 0:
                    _store_tile(outputs, layout, q, acc, peak, total, tile, HALF)
                release(q_ring, turn)
                turn += 2


@gluon.jit
def _attend_tile(q, layout, keys, tile, step, MOVING: gl.constexpr, PARTS: gl.constexpr):
    """Returns weighted sums of values, the weights' reference, their sums, and the next step.

    Only a list's last step can lack keys, of a partial block and of blocks that are not there: it
    comes first, outside of the loop, and there alone keys are masked. In the loop, P V of one step
    runs under the softmax of the next.
    MOVING: weights are relative to the largest logit so far, not to the first step's
    """
    k_ring, v_ring, lists, scale_log2 = keys
    columns, num_seqs, _ = layout
    HEAD_DIM: gl.constexpr = q.shape[1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    OF_SUM: gl.constexpr = gl.SliceLayout(1, SUMS)
    nothing = gl.zeros([ROWS, BLOCK], gl.float32, LOGITS)
    head, sequence, index = _find(tile, layout)
    length = column(columns, num_seqs, KEY_LEN, sequence)
    _, count, block = _list_of(head, sequence, index, layout, lists)
    k = filled(k_ring, step).permute((1, 0))
    logits = warpgroup_mma(q, k, nothing, use_acc=False)
    release(k_ring, step)
    lanes = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LOGITS))
    SIZE: gl.constexpr = BLOCK // PARTS
    end = length - block * SIZE
    if PARTS > 1:
        end = (count - 1) % PARTS * SIZE + gl.minimum(end, SIZE)
    end = gl.where(count > 0, end, 0)
    logits = gl.where(gl.expand_dims(lanes < end, 0), logits, float("-inf"))
    lowest = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, LOGITS))
    peak = _peak(logits, lowest, scale_log2)
    weights = _weigh(logits, peak, scale_log2)
    total = gl.sum(weights, 1)
    weights = gl.convert_layout(weights.to(q.dtype), WEIGHTS)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, SUMS)
    for _ in range(1, gl.cdiv(count, PARTS)):
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
        # After the wait: until then the product reads the former weights from registers.
        weights = gl.convert_layout(new_weights.to(q.dtype), WEIGHTS)
        if MOVING:
            acc *= gl.expand_dims(gl.convert_layout(gl.exp2(former - peak), OF_SUM), 1)
        step += 1
    acc = warpgroup_mma(weights, filled(v_ring, step), acc)
    release(v_ring, step)
    return acc, peak, total, step + 1


@gluon.jit
def _peak(logits, former, scale_log2):
    """The maximum is taken of raw products: the scaling then fuses with the subtraction (FMA)."""
    return gl.maximum(former, gl.max(logits, 1) * scale_log2)


@gluon.jit
def _weigh(logits, peak, scale_log2):
    return gl.exp2(logits * scale_log2 - gl.expand_dims(peak, 1))


@gluon.jit
def _overflow(acc, total):
    """1 if a sum is infinite or NaN, else 0."""
    finite = gl.min((gl.abs(acc) < float("inf")).to(gl.int32), 1)
    known = gl.convert_layout((total < float("inf")).to(gl.int32), finite.type.layout)
    return 1 - gl.min(finite & known, 0)


@gluon.jit
def _store_tile(outputs, layout, memory, acc, peak, total, tile, HALF: gl.constexpr):
    """Writes half a tile and its log-sum-exp; returns once `memory` can be filled again.

    memory: where its queries were, which are no longer needed
    """
    out_tiles, lse_ptr, out_head, lse_head = outputs
    columns, num_seqs, _ = layout
    seen = gl.convert_layout(total, gl.SliceLayout(1, acc.type.layout))
    seen = gl.expand_dims(seen, 1)
    result = gl.where(seen == 0, 0.0, acc / seen)
    head, sequence, index = _find(tile, layout)
    row = index * BLOCK + HALF * ROWS
    start = column(columns, num_seqs, QUERY_START, sequence)
    num_rows = column(columns, num_seqs, NUM_ROWS, sequence)
    memory.store(result.to(memory.dtype))
    fence_async_shared()
    store(out_tiles, start, start + num_rows, row, head * out_head, memory)
    if lse_ptr is not None:
        rows = row + gl.arange(0, ROWS, layout=peak.type.layout)
        lse = lse_ptr + head.to(gl.int64) * lse_head + start + rows
        gl.store(lse, (peak + gl.log2(total)) * LN_2, mask=rows < num_rows)
    tma.store_wait(0)
