# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Mean softmax mass per key block: the kernel and its twin against float64."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from kernel_cases import (
    BLOCK_SIZES,
    COMPILED,
    DEVICE,
    LONGER,
    RAGGED,
    assert_within_rounding,
    exact_attention,
    existing,
    logits_of,
    make_batch,
    run_attention,
)
from torch.nn.functional import pad

from sparsed_vllm.kernels import reference
from sparsed_vllm.kernels.block_scores import block_scores, score_generation
from sparsed_vllm.kernels.layout import FIRST_GEN

IMPLEMENTATIONS = {"kernel": (block_scores, DEVICE), "twin": (reference.block_scores, "cpu")}


def run(batch, lse=None, score=block_scores, device=DEVICE):
    """Into memory full of NaN.  lse [num_heads, rows of the sequences one after another]"""
    batch = batch.to(device)
    shape = (2, batch.q.shape[1], batch.layout.num_tiles, batch.layout.max_key_blocks)
    out = tuple(torch.full(shape, float("nan"), device=device))
    lse = None if lse is None else in_place(batch, lse)
    return score(batch.q, batch.k, lse, batch.layout, batch.selection, scale=batch.scale, out=out)


def in_place(batch, lse):
    """Where q's rows are, amid NaN, in a slice whose heads lie further apart."""
    wide = torch.full((lse.shape[0], len(batch.q) + 5), float("nan"), device=batch.q.device)
    wide[:, batch.rows.to(wide.device)] = lse.to(wide)
    return wide[:, : len(batch.q)]


def lse_of(batch):
    return exact_attention(batch)[1].float()


def exact_scores(batch):
    """From L x L softmaxes, zero padded to whole blocks."""
    layout, size = batch.layout, batch.layout.block_size
    shape = (2, batch.q.shape[1], layout.num_tiles, layout.max_key_blocks)
    scores = torch.full(shape, float("-inf"), dtype=torch.float64)
    for place, sequence in layout.sequences():
        first = int(batch.selection.host[FIRST_GEN, place])
        for kind, begin in enumerate((0, first)):
            mass = logits_of(batch, sequence)[:, :, begin * size :].softmax(-1)
            mass = pad(mass, (0, -mass.shape[2] % size, 0, -mass.shape[1] % layout.tile))
            means = mass.unflatten(2, (-1, size)).unflatten(1, (-1, layout.tile)).mean((2, 4))
            start = sequence.tile_start
            tiles = slice(start, start + means.shape[1])
            scores[kind, :, tiles, begin : begin + means.shape[2]] = means
    return scores


def check(batch, with_lse=False, score=block_scores):
    lse = lse_of(batch) if with_lse else None
    for actual, exact, twin in zip(
        run(batch, lse, score),
        exact_scores(batch),
        run(batch, lse, reference.block_scores, "cpu"),
        strict=True,
    ):
        assert_within_rounding(actual, exact, twin)


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_a_ragged_batch_equals_float64_within_rounding(block_size, dtype, with_lse):
    check(make_batch(RAGGED, block_size, dtype=dtype), with_lse)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_every_head_size_equals_float64_within_rounding(head_dim):
    check(make_batch([(70, 40), (1, 0)], 32, head_dim=head_dim, dtype=torch.float16))


@pytest.mark.parametrize("with_lse", [False, True])
def test_blocks_of_128_equal_float64_within_rounding(with_lse):
    check(
        make_batch([(127, 100), (1, 1), (257, 0)], 128, dtype=torch.bfloat16),
        with_lse,
    )


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(("rows", "block_size"), [(32, 16), (64, 16), (64, 32)])
def test_means_over_more_rows_than_a_key_block_has_equal_float64(rows, block_size, with_lse):
    batch = make_batch(RAGGED, block_size, query_block_size=rows, dtype=torch.bfloat16)
    check(batch, with_lse)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_means_over_a_tall_block_are_those_of_the_square_ones_in_it(block_size, name):
    """Rows past the end count as 0 in either."""
    square = make_batch([(300, 200)], block_size, heads=(1, 1))
    tall = make_batch([(300, 200)], block_size, query_block_size=128, heads=(1, 1))
    tall.q[tall.rows], tall.k[tall.tokens] = square.q[square.rows], square.k[square.tokens]
    small, large = (run(batch, None, *IMPLEMENTATIONS[name]) for batch in (square, tall))
    for mine, theirs in zip(large, small, strict=True):
        finite = theirs[0].isfinite()
        parts = theirs[0].where(finite, 0)
        parts = pad(parts, (0, 0, 0, -len(parts) % (128 // block_size)))
        means = parts.unflatten(0, (-1, 128 // block_size)).mean(1)
        torch.testing.assert_close(mine[0].where(finite[:1], 0), means, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("rows", "block_size"), [(16, 16), (128, 16), (128, 128)])
def test_generations_are_scored_beside_finished_prompts(rows, block_size):
    """As after the kernel for Hopper, which leaves prompts' blocks unscaled."""
    batch = make_batch([(300, 200), (1, 0), (127, 100)], block_size, query_block_size=rows)
    lse = lse_of(batch)
    expected = run(batch, lse)
    scores, gen_scores = (x.clone() for x in expected)
    for place, sequence in batch.layout.sequences():
        first = int(batch.selection.host[FIRST_GEN, place])
        tiles = slice(sequence.tile_start, sequence.tile_start - (-sequence.num_rows // rows))
        scores[:, tiles, :first] *= 0.999
        scores[:, tiles, first:] = float("-inf")
    gen_scores.fill_(float("-inf"))
    batch = batch.to(DEVICE)
    score_generation(
        batch.q,
        batch.k,
        in_place(batch, lse),
        batch.layout,
        batch.selection,
        scores,
        gen_scores,
        batch.scale,
    )
    assert torch.equal(gen_scores, expected[1])
    torch.testing.assert_close(scores, expected[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_query_heads_read_the_key_head_of_their_group(heads):
    check(make_batch([(40, 20)], 16, heads=heads))


def test_any_scale_can_be_asked_for():
    """The published LLaDA code scores with 1 / sqrt(num_heads)."""
    check(replace(make_batch([(100, 60)], 16), scale=4**-0.5))


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_equal_and_large_logits_give_no_nan(spread, with_lse):
    check(make_batch([(70, 40)], 16, spread=spread), with_lse)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_huge_logits_are_decided_as_one_or_zero(name):
    batch = make_batch([(64, 32)], 16, heads=(1, 1), spread=1e6)
    scores, _ = run(batch, None, *IMPLEMENTATIONS[name])
    assert (scores.cpu().sum(-1) * 16 - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("with_lse", [False, True])
def test_batch_mates_do_not_change_a_sequence(with_lse, name):
    batch = make_batch([(70, 40), (33, 10), (90, 90)], 16)
    lse = lse_of(batch) if with_lse else None
    together = run(batch, lse, *IMPLEMENTATIONS[name])
    apart = run(batch.only([1]), lse[:, 70:103] if with_lse else None, *IMPLEMENTATIONS[name])
    for mine, theirs in zip(apart, together, strict=True):
        assert torch.equal(mine, theirs[:, 5:8, :3])
        assert (theirs[:, 5:8, 3:] == float("-inf")).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("with_lse", [False, True])
def test_a_batch_mate_full_of_nan_changes_nothing(with_lse, name):
    batch = make_batch([(33, 10), (70, 40)], 16)
    lse = lse_of(batch) if with_lse else None
    before = run(batch, lse, *IMPLEMENTATIONS[name])
    mate = batch.sequences[1]
    batch.q[mate.queries] = batch.k[mate.keys] = float("nan")
    if with_lse:
        lse[:, 33:] = float("nan")
    for mine, theirs in zip(before, run(batch, lse, *IMPLEMENTATIONS[name]), strict=True):
        assert torch.equal(mine[:, :3], theirs[:, :3])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_some_of_the_heads_get_what_all_together_do(name):
    """As where the scores of all heads at once would be too large."""
    score, device = IMPLEMENTATIONS[name]
    batch = make_batch([(70, 40), (33, 10)], 16, heads=(6, 3)).to(device)
    lse = run_attention(batch, reference.dense_attention, device=device)[1]
    whole = run(batch, lse, score, device)
    some = replace(batch, q=batch.q[:, 2:4], k=batch.k[:, 1:2])
    options = {"scale": batch.scale}
    part = score(some.q, some.k, in_place(batch, lse)[2:4], some.layout, some.selection, **options)
    for mine, theirs in zip(part, whole, strict=True):
        torch.testing.assert_close(mine, theirs[2:4], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [[], [(0, 0)], [(0, 0), (40, 3), (0, 0), (17, 0), (0, 0)]])
def test_sequences_without_rows_are_no_work(sizes, name):
    batch = make_batch(sizes, 16)
    scores, _ = run(batch, None, *IMPLEMENTATIONS[name])
    assert scores.shape == (2, batch.layout.num_tiles, batch.layout.max_key_blocks)
    assert (scores.isfinite().cpu() == existing(batch)).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("block_size", "head_dim", "dtype"), COMPILED)
def test_every_shape_compiles_and_equals_float64(block_size, head_dim, dtype):
    for rows in (block_size, 128):
        options = {"query_block_size": rows, "head_dim": head_dim, "dtype": dtype}
        batch = make_batch(LONGER, block_size, **options)
        check(batch)
        check(batch, with_lse=True)


def on_hopper(test):
    has_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    skipped = pytest.mark.skipif(not has_gpu, reason="needs a GPU of compute capability 9.0")
    return pytest.mark.gpu(skipped(test))


def hopper_block_scores(*args, **options):
    """Imported at need: not every Triton has Gluon."""
    reason = "this Triton has no Gluon"
    module = pytest.importorskip("sparsed_vllm.kernels.hopper_scores", reason=reason)
    return module.block_scores(*args, **options)


# No, one, an even and an odd number of prompt blocks and of query blocks.
SIZES = [
    [(1, 0), (127, 100), (128, 128)],
    [(129, 129), (257, 128), (300, 256)],
    [(640, 500), (900, 0), (1500, 1400)],
]


@on_hopper
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_hoppers_kernel_equals_float64_within_rounding(block_size, dtype, head_dim, sizes):
    options = {"query_block_size": 128, "dtype": dtype, "heads": (4, 2), "head_dim": head_dim}
    batch = make_batch(sizes, block_size, **options)
    check(batch, with_lse=True, score=hopper_block_scores)
    check(batch, score=hopper_block_scores)


@on_hopper
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (7, 1)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_hoppers_kernel_takes_groups_and_equal_and_large_logits(block_size, heads, spread):
    options = {"query_block_size": 128, "dtype": torch.bfloat16, "heads": heads, "head_dim": 128}
    batch = make_batch([(700, 600)], block_size, spread=spread, **options)
    check(batch, with_lse=True, score=hopper_block_scores)


@on_hopper
def test_thousands_of_launches_on_hopper_agree_to_the_bit():
    """Of mixed shapes, so that what one leaves behind in shared memory differs from the next."""
    cases = []
    shapes = [
        ([(3000, 2900)], (8, 2), 128),
        ([(129, 128)], (1, 1), 128),
        ([(1900, 1500), (700, 512)], (6, 3), 64),
    ]
    for (sizes, heads, head_dim), block_size in product(shapes, BLOCK_SIZES):
        options = {"query_block_size": 128, "dtype": torch.bfloat16, "head_dim": head_dim}
        batch = make_batch(sizes, block_size, heads=heads, **options)
        lse = lse_of(batch).to("cuda")
        cases.append((batch.to("cuda"), lse, hopper_block_scores))
    expected = [run(*case) for case in cases]
    for _ in range(1000):
        for case, before in zip(cases, expected, strict=True):
            for actual, first in zip(run(*case), before, strict=True):
                assert torch.equal(actual, first)
