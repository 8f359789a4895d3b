# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The kernel for Hopper: against float64, and against itself, since a race shows only at times."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from kernel_cases import (
    check_sparse,
    make_batch,
    random_mask,
    run_attention,
    tables_of,
)

from sparsed_vllm.kernels import api

hopper = pytest.importorskip("sparsed_vllm.kernels.hopper", reason="this Triton has no Gluon")

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0"),
]

RAGGED = [(1, 0), (127, 100), (128, 128), (129, 0), (300, 250), (640, 10)]


def check(batch, mask=None, **options):
    mask = random_mask(batch, 0.5) if mask is None else mask
    check_sparse(batch, mask, hopper.block_sparse_attention, **options)


def run(batch, tables):
    return run_attention(batch, hopper.block_sparse_attention, tables, device="cuda")


@pytest.fixture(params=[128, 64, 32, 16])
def blocks(request):
    """Makes batches with key blocks of one size."""
    return partial(blocks_of, request.param)


def blocks_of(block_size, sizes, dtype=torch.bfloat16, heads=(4, 2), head_dim=128, **options):
    """Query blocks are of 128 tokens, whatever key blocks are."""
    options |= {"query_block_size": 128, "dtype": dtype, "heads": heads, "head_dim": head_dim}
    return make_batch(sizes, block_size, **options)


def everything(batch):
    return random_mask(batch, 1.0)


def uneven(batch):
    """Rows from none to all of the blocks."""
    mask = random_mask(batch, 1.0)
    return mask & (torch.rand(mask.shape) < torch.rand(*mask.shape[:2], 1) ** 3)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_ragged_batch_equals_float64_within_rounding(blocks, dtype, head_dim):
    check(blocks(RAGGED, dtype, head_dim=head_dim))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (7, 1)])
def test_query_heads_have_their_own_lists_and_their_groups_keys(blocks, heads):
    check(blocks([(700, 20)], heads=heads))


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_lists_of_any_length_equal_float64_within_rounding(blocks, share):
    batch = blocks([(1500, 20)])
    check(batch, random_mask(batch, share))


def test_ids_may_be_int32(blocks):
    check(blocks([(300, 20)]), dtype=torch.int32)


@pytest.mark.parametrize("spread", [0.0, 4.0, 1e4])
def test_equal_and_huge_logits_give_no_nan(blocks, spread):
    check(blocks([(700, 40)], spread=spread))


def test_more_tiles_than_multiprocessors_equal_float64_within_rounding(blocks):
    batch = blocks([(128 * 6 - 5, 100)], heads=(64, 4))
    check(batch, random_mask(batch, 0.3))


def test_rows_of_one_block_and_of_all_follow_each_other(blocks):
    """In 384 tiles, three a multiprocessor."""
    batch = blocks([(128 * 6, 100)], heads=(64, 64))
    mask = uneven(batch)
    mask[..., -1] |= ~mask.any(-1)
    mask[::3] = True
    check(batch, mask)


def test_empty_lists_among_others_give_zeros_and_no_mass(blocks):
    batch = blocks([(400, 8)], heads=(128, 4))
    batch.v[batch.tokens[5]] = float("inf")
    mask = random_mask(batch, 1.0)
    mask[::2] = False
    out, lse = run(batch, tables_of(batch, mask))
    assert (out[:, ::2] == 0).all() and (lse[::2] == float("-inf")).all()
    assert lse[1::2].isfinite().all()


def test_logits_of_minus_infinity_weigh_nothing(blocks):
    batch = blocks([(300, 8)], heads=(1, 1))
    silence(batch)
    batch.k[batch.tokens[3], 0, 0] = float("-inf")
    check(batch, everything(batch))


def silence(batch):
    """Logits of minus infinity at keys 140 to 260 of the only sequence."""
    batch.q[batch.rows, 0, 0] = 1.0
    batch.k[batch.tokens[140:260], 0, 0] = float("-inf")


def rising(blocks, sizes, rows, dtype=torch.bfloat16, **options):
    """For these queries the first 20 keys' logits lie 200 above those of the last block.

    rows: of all sequences' rows, one after another
    By the last column: tensor cores would round the sums of further ones to its size.
    """
    batch = blocks(sizes, dtype, **options)
    batch.q[batch.rows, :, -1] = batch.k[batch.tokens, :, -1] = 0.0
    batch.q[batch.rows[rows], :, -1] = 1.0
    batch.k[batch.tokens[:20], :, -1] = 200 / batch.scale
    return batch


SOME_ROWS = {
    "one": slice(7, 8),
    "half a tile": slice(192, 256),
    "one tile": slice(128, 256),
    "the last": slice(640, None),
    "all": slice(None),
}


@pytest.mark.parametrize("rows", SOME_ROWS.values(), ids=SOME_ROWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_far_above_those_of_the_last_block_equal_float64_within_rounding(
    blocks, dtype, rows
):
    batch = rising(blocks, [(700, 40)], rows, dtype)
    mask = random_mask(batch, 0.5)
    mask[..., 0] = True
    check(batch, mask)


def test_values_near_the_largest_number_stay_finite(blocks):
    """Sums of weights that are small enough themselves may not overflow through their values."""
    batch = rising(blocks, [(400, 0)], slice(None), heads=(2, 2))
    batch.k[batch.tokens[:20], :, -1] = 60 / batch.scale
    batch.v[batch.tokens] = 1e37
    out, _ = run(batch, tables_of(batch, everything(batch)))
    assert torch.allclose(out.float(), torch.full_like(out.float(), 1e37), rtol=1e-2)


MANY = [(n, 0) for n in (1, 640, 127, 128, 129, 3, 255, 256, 257, 64, 65, 900, 63, 385, 40)]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_ragged_sequences_in_one_launch_equal_each_alone(blocks, dtype, head_dim):
    """To the bit, in any order and company."""
    batch = blocks(MANY, dtype, head_dim=head_dim)
    tables = tables_of(batch, random_mask(batch, 0.6))
    out, lse = run(batch, tables)
    ends = torch.tensor([length for length, _ in MANY]).cumsum(0).tolist()
    for place, (length, _) in enumerate(MANY):
        rows = slice(ends[place] - length, ends[place])
        alone, lse_alone = run(batch.only([place]), tables)
        assert torch.equal(alone, out[rows]) and torch.equal(lse_alone, lse[:, rows])
    order = torch.randperm(len(MANY))[:9].tolist()
    rows = torch.cat([torch.arange(ends[i] - MANY[i][0], ends[i]) for i in order])
    some, lse_some = run(batch.only(order), tables)
    assert torch.equal(some, out[rows]) and torch.equal(lse_some, lse[:, rows])


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("length", [1, 100, 129, 300])
def test_a_batch_mate_full_of_nan_changes_nothing(blocks, length, odd):
    """Even one that begins in the row after the sequence's last, in the same block of memory."""
    batch = blocks([(length, 0), (400, 0)])
    tables = tables_of(batch, random_mask(batch, 1.0))
    before, lse = run(batch, tables)
    own, mate = batch.sequences
    batch.q[mate.queries] = batch.k[mate.keys] = batch.v[mate.keys] = odd
    for x, rows in ((batch.q, own.queries), (batch.k, own.keys), (batch.v, own.keys)):
        x[: rows.start] = x[rows.stop :] = odd
    after, lse_after = run(batch, tables)
    assert torch.equal(after[:length], before[:length])
    assert torch.equal(lse_after[:, :length], lse[:, :length])
    assert after[length:].isnan().all()


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_rows_of_no_sequence_stay_as_they_are(blocks, odd):
    """They hold what other launches of the same step write there."""
    batch = blocks([(300, 0), (400, 0), (129, 0)]).to("cuda")
    tables = tables_of(batch.to("cpu"), random_mask(batch.to("cpu"), 0.5))
    out = torch.full_like(batch.q, odd)
    some = batch.only([2, 0])
    options = {"scale": batch.scale, "out": out}
    on_gpu = replace(tables, **{name: x.cuda() for name, x in vars(tables).items()})
    hopper.block_sparse_attention(some.q, some.k, some.v, some.layout, on_gpu, **options)
    others = torch.ones(len(out), dtype=torch.bool)
    others[some.rows] = False
    untouched, expected = out[others.cuda()], torch.full_like(out[others.cuda()], odd)
    assert torch.equal(untouched.view(torch.int16), expected.view(torch.int16))
    assert out[some.rows.cuda()].isfinite().all()


@pytest.mark.parametrize("rows", [slice(0, 0), slice(200, 201), slice(None)])
def test_a_window_gets_what_the_whole_sequence_does(blocks, rows):
    batch = rising(blocks, [(300, 10), (1000, 40), (129, 1)], rows)
    tables = tables_of(batch, random_mask(batch, 0.5))
    whole, whole_lse = run(batch, tables)
    part, part_lse = run(batch.windows([(256, 300), (128, 512), (0, 129)]), tables)
    rows = torch.cat([torch.arange(*ends) for ends in [(256, 300), (428, 812), (1300, 1429)]])
    assert torch.equal(part, whole[rows]) and torch.equal(part_lse, whole_lse[:, rows])


@pytest.mark.parametrize(
    "sizes", [[], [(0, 0)], [(0, 0), (40, 3), (0, 0), (0, 0), (170, 0), (0, 0)]]
)
def test_sequences_without_rows_are_no_work(blocks, sizes):
    batch = blocks(sizes)
    out, lse = run(batch, tables_of(batch, random_mask(batch, 1.0)))
    assert out.isfinite().all() and lse.isfinite().all()


def test_unaligned_tensors_take_the_plain_kernel(blocks):
    """TMA reads from multiples of 16 bytes only."""
    batch = blocks([(300, 20)], heads=(2, 2))
    mask = random_mask(batch, 0.5)

    def attend(q, k, v, layout, tables, **options):
        q, k, v = (shifted(x) for x in (q, k, v))
        return api.block_sparse_attention(q, k, v, layout, tables, **options)

    check_sparse(batch, mask, attend)


def shifted(x):
    """A copy that begins two bytes further."""
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def test_random_shapes_equal_float64_within_rounding(blocks):
    numbers = random.Random(0)
    for _ in range(40):
        kv_heads, head_dim = numbers.choice([1, 2, 3]), numbers.choice([64, 128])
        sizes = [(numbers.randint(1, 500), 0) for _ in range(numbers.randint(1, 3))]
        heads = (kv_heads * numbers.choice([1, 2, 7]), kv_heads)
        batch = blocks(sizes, heads=heads, head_dim=head_dim)
        mask = random_mask(batch, numbers.random())
        mask[..., 0] = True
        check(batch, mask)


def stress_cases():
    """Batches and masks that differ in what a tile's work depends on, all in the same launches."""
    for block_size in (128, 64, 32, 16):
        blocks = partial(blocks_of, block_size)
        for length, heads, head_dim in [
            (3000, (8, 2), 128),
            (128, (1, 1), 128),
            (1900, (6, 3), 64),
        ]:
            batch = blocks([(length, 0)], heads=heads, head_dim=head_dim)
            mask = random_mask(batch, 0.4)
            mask[..., 0] = True
            yield batch, mask
        for spread in (0.0, 1e4):  # equal and huge logits
            batch = blocks([(700, 0), (129, 0)], heads=(4, 4), spread=spread)
            yield batch, random_mask(batch, 0.6)
        for rows in SOME_ROWS.values():
            batch = rising(blocks, [(1500, 0)], rows, heads=(24, 8))
            yield batch, random_mask(batch, 0.6)
        batch = blocks([(1500, 0)], heads=(8, 8))
        yield batch, uneven(batch)
        single = torch.zeros(8, 12, batch.layout.max_key_blocks, dtype=torch.bool)
        firsts = torch.arange(0, single.shape[2], 128 // block_size)
        single[:, torch.arange(12), firsts] = True
        yield batch, single
        gaps = blocks([(300, 0)], heads=(1, 1))
        silence(gaps)
        yield gaps, everything(gaps)


def launches_that_differ(cases, expected):
    """How many results of these launches are not what they were before, to the bit."""
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for case, results in zip(cases, expected, strict=True):
        for actual, first in zip(run(*case), results, strict=True):
            different += (actual.view(torch.int8) != first.view(torch.int8)).any()
    return different


def on_the_gpu(batch, mask):
    return batch.to("cuda"), tables_of(batch, mask)


def test_thousands_of_launches_agree_with_float64_and_to_the_bit():
    """Of mixed shapes, so that what one leaves behind in shared memory differs from the next."""
    cases = []
    for batch, mask in stress_cases():
        check(batch, mask)
        cases.append(on_the_gpu(batch, mask))
    expected = [run(*case) for case in cases]
    assert sum(launches_that_differ(cases, expected) for _ in range(500)) == 0


def test_fresh_inputs_agree_with_themselves_to_the_bit(blocks):
    for _ in range(200):
        batch = blocks([(700, 0), (400, 0)], heads=(8, 2))
        cases = [on_the_gpu(batch, random_mask(batch, random.random()))] * 5
        assert launches_that_differ(cases, [run(*cases[0])] * 5) == 0
