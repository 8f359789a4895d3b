# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gluon, for sm_90: scores of the prompts' key blocks where the log-sum-exp is known.

These blocks are whole and need no mask, and they are most of a recording; the Triton kernel scores
the generation's. A program has two query blocks of one head, and goes over the prompt's keys, 128 a
step: one key block, or several. Its first four warps only load. Two consumers of four warps have a
query block each: q k^T of one half of it runs under the exponentials of the other.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsed_vllm.kernels import block_scores as plain
from sparsed_vllm.kernels.layout import BatchLayout, Selection
from sparsed_vllm.kernels.reference import empty_scores
from sparsed_vllm.kernels.rings import (
    column,
    fill,
    filled,
    find_tile,
    make_ring,
    release,
    tile_at,
    tiles_of,
)
from sparsed_vllm.kernels.tiles import (
    FIRST_GEN,
    KEY_LEN,
    KEY_START,
    LOG2_E,
    QUERY_START,
    TILE_START,
)

BLOCK = gl.constexpr(128)  # query rows of a consumer, keys of a step
ROWS = gl.constexpr(64)  # query rows of a product
STAGES = gl.constexpr(4)  # key blocks in shared memory
REGISTERS = gl.constexpr(240)  # of a consumer's thread


def block_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    layout: BatchLayout,
    selection: Selection,
    *,
    scale: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See reference.block_scores.

    16 bits a number, heads of 64 or 128, query blocks of 128; base and strides aligned to 16 bytes
    """
    if lse is None:
        return plain.block_scores(q, k, lse, layout, selection, scale=scale, out=out)
    scores, gen_scores = out or empty_scores(q, layout)
    scores.fill_(float("-inf"))
    gen_scores.fill_(float("-inf"))
    if selection.host[FIRST_GEN.value].any() and layout.num_tiles:
        _prompt_scores_kernel[(num_pairs(layout), q.shape[1])](
            tiles_of(q, ROWS.value),
            tiles_of(k, BLOCK.value),
            lse,
            scores,
            layout.columns,
            selection.counts,
            layout.num_seqs,
            scale * LOG2_E.value,
            q.stride(1),
            k.stride(1),
            q.shape[1] // k.shape[1],
            lse.stride(0),
            scores.stride(0),
            scores.stride(1),
            PARTS=BLOCK.value // layout.block_size,
            num_warps=4,
        )
    plain.score_generation(q, k, lse, layout, selection, scores, gen_scores, scale)
    return scores, gen_scores


def num_pairs(layout: BatchLayout) -> int:
    """Programs of a head, two query blocks each.

    So that none takes blocks of two sequences, sequences are numbered as if one tile lay between
    each and the next; one that then begins with an odd number has its first pair after that.
    """
    return (layout.num_tiles + layout.num_seqs + 1) // 2


# Nothing depends on what divides these, and each would be compiled for anew.
@gluon.jit(
    do_not_specialize=[
        "num_seqs",
        "q_head",
        "k_head",
        "group",
        "lse_head",
        "scores_head",
        "scores_block",
    ],
    do_not_specialize_on_alignment=["lse_ptr", "scores_ptr", "columns", "counts"],
)
def _prompt_scores_kernel(
    q_tiles,
    k_tiles,
    lse_ptr,
    scores_ptr,
    columns,
    counts,
    num_seqs,
    scale_log2,
    q_head,
    k_head,
    group,
    lse_head,
    scores_head,
    scores_block,
    PARTS: gl.constexpr,
):
    """Program (two query blocks of a sequence, head); x_head: stride from head to head.

    PARTS: key blocks of a step
    """
    q_ring = make_ring(4, q_tiles, 1)
    k_ring = make_ring(STAGES, k_tiles, 2)
    fence_async_shared()
    rings = (q_ring, k_ring)
    layout = (columns, counts, num_seqs)
    inputs = (q_tiles, k_tiles, q_head, k_head, group)
    outputs = (lse_ptr, scores_ptr, lse_head, scores_head, scores_block)
    gl.warp_specialize(
        [
            (_load_blocks, (rings, layout, inputs, PARTS)),
            (_score_blocks, (rings, layout, outputs, scale_log2, 0, PARTS)),
            (_score_blocks, (rings, layout, outputs, scale_log2, 1, PARTS)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


@gluon.jit
def _find_pair(layout):
    """This program's sequence, its first query block, and the key blocks to score.

    See num_pairs. A pair past the sequence's end scores none.
    """
    columns, counts, num_seqs = layout
    sequence, index = find_tile(columns, num_seqs, 2 * gl.program_id(0), 1)
    index -= index % 2
    length = column(columns, num_seqs, KEY_LEN, sequence)
    count = column(counts, num_seqs, FIRST_GEN, sequence)
    return sequence, index, length, gl.where(index * BLOCK < length, count, 0)


@gluon.jit
def _load_blocks(rings, layout, inputs, PARTS: gl.constexpr):
    """The producer. It loads one step more than is scored: the consumers run a product ahead."""
    q_ring, k_ring = rings
    columns, _, num_seqs = layout
    q_tiles, k_tiles, q_head, k_head, group = inputs
    head = gl.program_id(1)
    sequence, index, length, count = _find_pair(layout)
    start = column(columns, num_seqs, QUERY_START, sequence)
    for part in gl.static_range(4):
        row = index * BLOCK + part * ROWS
        fill(q_ring, part, q_tiles, start, start + length, row, head * q_head)
    start = column(columns, num_seqs, KEY_START, sequence)
    for step in range(gl.cdiv(count, PARTS) + 1):
        k_column = head // group * k_head
        fill(k_ring, step, k_tiles, start, start + length, step * BLOCK, k_column)


@gluon.jit
def _score_blocks(rings, layout, outputs, scale_log2, PLACE: gl.constexpr, PARTS: gl.constexpr):
    """A consumer of query block PLACE, 0 or 1, of the program.

    Each product runs under the exponentials of the one before, and is awaited before the next one
    begins: with two in flight over the loop's back edge, ptxas serializes them.
    """
    q_ring, k_ring = rings
    columns, _, num_seqs = layout
    lse_ptr, scores_ptr, lse_head, scores_head, scores_block = outputs
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    QUERIES: gl.constexpr = gl.DotOperandLayout(0, LOGITS, 2)
    sequence, index, length, count = _find_pair(layout)
    block = index + PLACE
    tile = column(columns, num_seqs, TILE_START, sequence) + block
    head = gl.program_id(1).to(gl.int64)
    rows = block * BLOCK + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOGITS))
    lse = lse_ptr + head * lse_head + column(columns, num_seqs, QUERY_START, sequence)
    upper_lse = _load_lse(lse, rows, length)
    lower_lse = _load_lse(lse, rows + ROWS, length)
    scores = scores_ptr + head * scores_head + tile.to(gl.int64) * scores_block
    # Queries stay in registers: from shared memory, every product would read them again.
    upper_q = filled(q_ring, 2 * PLACE).load(QUERIES)
    lower_q = filled(q_ring, 2 * PLACE + 1).load(QUERIES)
    nothing = gl.zeros([ROWS, BLOCK], gl.float32, LOGITS)
    k = filled(k_ring, 0).permute((1, 0))
    upper = warpgroup_mma(upper_q, k, nothing, use_acc=False, is_async=True)
    for step in range(gl.cdiv(count, PARTS)):
        upper = warpgroup_mma_wait(0, [upper])
        k = tile_at(k_ring, step % STAGES).permute((1, 0))
        lower = warpgroup_mma(lower_q, k, nothing, use_acc=False, is_async=True)
        mass = _sum_weights(upper, upper_lse, scale_log2, PARTS)
        lower = warpgroup_mma_wait(0, [lower])
        release(k_ring, step)
        k = filled(k_ring, step + 1).permute((1, 0))
        upper = warpgroup_mma(upper_q, k, nothing, use_acc=False, is_async=True)
        mass += _sum_weights(lower, lower_lse, scale_log2, PARTS)
        _store_means(scores, mass, step, gl.where(block * BLOCK < length, count, 0), PARTS)
    warpgroup_mma_wait(0, [upper])


@gluon.jit
def _load_lse(lse_ptr, rows, length):
    """In units of log 2. Rows past the end have no mass: exp2(logit - inf) is 0."""
    return gl.load(lse_ptr + rows, mask=rows < length, other=float("inf")) * LOG2_E


@gluon.jit
def _sum_weights(logits, lse, scale_log2, PARTS: gl.constexpr):
    """Weights summed over a row; for several parts, over two rows of each.

    A thread holds rows r and r + 8 of its warp's 16, and two of every eight columns: sums over what
    it holds come first. Those over lanes are not left for later: without their shuffles the weights
    would be computed under the next product, which writes to their logits' registers.
    """
    weights = gl.exp2(logits * scale_log2 - gl.expand_dims(lse, 1))
    if PARTS == 1:
        sums = gl.sum(weights, 1)
    else:
        split = weights.reshape([ROWS // 16, 2, 8, PARTS, BLOCK // PARTS // 8, 4, 2])
        sums = gl.sum(gl.sum(gl.sum(gl.sum(split, 6), 4), 1), 3)
    return sums


@gluon.jit
def _store_means(scores, sums, step, count, PARTS: gl.constexpr):
    """Writes the step's means; sums: as _sum_weights has them.  count: key blocks to score"""
    if PARTS == 1:
        mean = gl.sum(sums, 0) * (1.0 / (BLOCK * BLOCK))
        if step < count:
            gl.store(scores + step, mean)
    else:
        mass = gl.sum(gl.sum(sums, 1), 0)
        blocks = step * PARTS + gl.arange(0, PARTS, layout=mass.type.layout)
        gl.store(scores + blocks, mass * (PARTS / (BLOCK * BLOCK)), mask=blocks < count)
