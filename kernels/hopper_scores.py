# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gluon, for sm_90: block scores whose log-sum-exp is known; the Triton kernel does the rest.

Here are a prompt's blocks, which need no mask; they are most of a recording. A program takes two
query blocks of one head and all key blocks. Its first warps only load. Two consumers of four warps
have a query block each, and multiply one half of it while they exponentiate the other.
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
from sparsed_vllm.kernels.layout import QueryBlocks, first_gen_block
from sparsed_vllm.kernels.reference import empty_scores
from sparsed_vllm.kernels.rings import fill, filled, make_ring, release, tiles_of

BLOCK = gl.constexpr(128)  # queries of a consumer, keys of a step
ROWS = gl.constexpr(64)  # queries of a product
STAGES = gl.constexpr(4)  # key blocks in shared memory
REGISTERS = gl.constexpr(240)  # of a consumer's thread
LOG2_E = gl.constexpr(1.4426950408889634)


def block_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    blocks: QueryBlocks,
    *,
    scale: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See reference.block_scores.

    16 bits a number, heads of 64 or 128, blocks of 128; base and strides aligned to 16 bytes
    """
    if lse is None:
        return plain.block_scores(q, k, lse, blocks, scale=scale, out=out)
    assert lse.is_contiguous()
    scores, gen_scores = out or empty_scores(q, blocks)
    scores.fill_(float("-inf"))
    gen_scores.fill_(float("-inf"))
    for span, places in blocks.by_span():
        tokens = slice(span.first, span.first + span.length)
        count = first_gen_block(span, blocks.block_size)
        _score_prompt(q[tokens], k[tokens], lse[:, tokens], scores[:, places], count, scale)
    plain.score_generation(q, k, lse, blocks, scores, gen_scores, scale)
    return scores, gen_scores


def _score_prompt(
    q: Tensor, k: Tensor, lse: Tensor, scores: Tensor, count: int, scale: float
) -> None:
    """One launch for one sequence: scores of its first `count` key blocks.

    q, k [its tokens, ...];  scores [heads, its query blocks, ...]
    """
    if count:
        _prompt_scores_kernel[((scores.shape[1] + 1) // 2, q.shape[1])](
            *(tiles_of(q, ROWS), tiles_of(k, BLOCK), lse, scores),
            *(q.shape[0], count, scale * LOG2_E.value),
            *(q.stride(1), k.stride(1), q.shape[1] // k.shape[1]),
            *(lse.stride(0), scores.stride(0), scores.stride(1)),
            num_warps=4,
        )


# Nothing depends on what divides these, and each would be compiled for anew.
_ANY_VALUE = [
    *("length", "count", "q_head", "k_head", "group"),
    *("lse_head", "scores_head", "scores_block"),
]


@gluon.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=["lse_ptr", "scores_ptr"])
def _prompt_scores_kernel(
    q_tiles,
    k_tiles,
    lse_ptr,
    scores_ptr,
    length,
    count,
    scale_log2,
    q_head,
    k_head,
    group,
    lse_head,
    scores_head,
    scores_block,
):
    """Program (two query blocks, head); x_head: columns, or numbers, from head to head."""
    q_ring = make_ring(4, q_tiles, 1)
    k_ring = make_ring(STAGES, k_tiles, 2)
    fence_async_shared()
    rings = (q_ring, k_ring)
    inputs = (q_tiles, k_tiles, q_head, k_head, group)
    outputs = (lse_ptr, scores_ptr, lse_head, scores_head, scores_block)
    gl.warp_specialize(
        [
            (_load_blocks, (rings, inputs, count)),
            (_score_blocks, (rings, outputs, length, count, scale_log2, 0)),
            (_score_blocks, (rings, outputs, length, count, scale_log2, 1)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


@gluon.jit
def _load_blocks(rings, inputs, count):
    """The producer. The block after the last is loaded, too: consumers begin its product."""
    q_ring, k_ring = rings
    q_tiles, k_tiles, q_head, k_head, group = inputs
    head = gl.program_id(1)
    for part in gl.static_range(4):
        row = gl.program_id(0) * (2 * BLOCK) + part * ROWS
        fill(q_ring, part, q_tiles, row, head * q_head)
    for step in range(count + 1):
        fill(k_ring, step, k_tiles, step * BLOCK, head // group * k_head)


@gluon.jit
def _score_blocks(rings, outputs, length, count, scale_log2, PLACE: gl.constexpr):
    """A consumer: PLACE 0 or 1 of the program's query blocks.

    Each product runs under the weights of the one before. It is awaited before the next one
    begins: ptxas would serialize products that it cannot tell apart over the loop's end.
    """
    q_ring, k_ring = rings
    lse_ptr, scores_ptr, lse_head, scores_head, scores_block = outputs
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    QUERIES: gl.constexpr = gl.DotOperandLayout(0, LOGITS, 2)
    block = gl.program_id(0) * 2 + PLACE
    head = gl.program_id(1).to(gl.int64)
    rows = block * BLOCK + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOGITS))
    upper_lse = _load_lse(lse_ptr + head * lse_head, rows, length)
    lower_lse = _load_lse(lse_ptr + head * lse_head, rows + ROWS, length)
    scores = scores_ptr + head * scores_head + block.to(gl.int64) * scores_block
    # In registers: from shared memory each product would read them anew.
    upper_q = filled(q_ring, 2 * PLACE).load(QUERIES)
    lower_q = filled(q_ring, 2 * PLACE + 1).load(QUERIES)
    nothing = gl.zeros([ROWS, BLOCK], gl.float32, LOGITS)
    k = filled(k_ring, 0).permute((1, 0))
    upper = warpgroup_mma(upper_q, k, nothing, use_acc=False, is_async=True)
    for step in range(count):
        upper = warpgroup_mma_wait(0, [upper])
        k = k_ring[0].index(step % STAGES).permute((1, 0))
        lower = warpgroup_mma(lower_q, k, nothing, use_acc=False, is_async=True)
        mass = _sum_weights(upper, upper_lse, scale_log2)
        lower = warpgroup_mma_wait(0, [lower])
        release(k_ring, step)
        k = filled(k_ring, step + 1).permute((1, 0))
        upper = warpgroup_mma(upper_q, k, nothing, use_acc=False, is_async=True)
        mass += _sum_weights(lower, lower_lse, scale_log2)
        mean = gl.sum(mass, 0) * (1.0 / (BLOCK * BLOCK))
        if block * BLOCK < length:
            gl.store(scores + step, mean)
    warpgroup_mma_wait(0, [upper])


@gluon.jit
def _load_lse(lse_ptr, rows, length):
    """In units of log 2. exp2(logit - inf) is 0: rows past the end have no mass."""
    return gl.load(lse_ptr + rows, mask=rows < length, other=float("inf")) * LOG2_E


@gluon.jit
def _sum_weights(logits, lse, scale_log2):
    return gl.sum(gl.exp2(logits * scale_log2 - gl.expand_dims(lse, 1)), 1)
