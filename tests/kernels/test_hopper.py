# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The kernel for Hopper: against float64, and against itself, since a race shows only at times."""

import random
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    Table,
    check_sparse,
    in_windows,
    make_batch,
    random_mask,
    run_sparse,
    table_of,
)

from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.layout import QueryBlocks, Span

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


def run(batch, table):
    return run_sparse(batch, table, hopper.block_sparse_attention)


def blocks_of_128(sizes, dtype=torch.bfloat16, heads=(4, 2), head_dim=128, **options):
    return make_batch(sizes, 128, dtype=dtype, heads=heads, head_dim=head_dim, **options)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_ragged_batch_equals_float64_within_rounding(dtype, head_dim):
    check(blocks_of_128(RAGGED, dtype, head_dim=head_dim))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (7, 1)])
def test_query_heads_have_their_own_lists_and_their_groups_keys(heads):
    check(blocks_of_128([(700, 20)], heads=heads))


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_lists_of_any_length_equal_float64_within_rounding(share):
    batch = blocks_of_128([(1500, 20)])
    check(batch, random_mask(batch, share))


def test_ids_may_be_int32():
    check(blocks_of_128([(300, 20)]), dtype=torch.int32)


@pytest.mark.parametrize("spread", [0.0, 4.0, 1e4])
def test_equal_and_huge_logits_give_no_nan(spread):
    check(blocks_of_128([(700, 40)], spread=spread))


def test_more_tiles_than_multiprocessors_equal_float64_within_rounding():
    batch = blocks_of_128([(128 * 6 - 5, 100)], heads=(64, 4))
    check(batch, random_mask(batch, 0.3))


def test_rows_of_one_block_and_of_all_follow_each_other():
    """In 384 tiles, three a multiprocessor."""
    batch = blocks_of_128([(128 * 6, 100)], heads=(64, 64))
    mask = torch.rand(64, 6, 6) < torch.rand(64, 6, 1) ** 3
    mask[..., -1] |= ~mask.any(-1)
    mask[::3] = True
    check(batch, mask)


def test_empty_lists_among_others_give_zeros_and_no_mass():
    batch = blocks_of_128([(400, 8)], heads=(128, 4))
    batch.v[5] = float("inf")
    mask = random_mask(batch, 1.0)
    mask[::2] = False
    out, lse = run(batch, table_of(batch, mask))
    assert (out[:, ::2] == 0).all() and (lse[::2] == float("-inf")).all()
    assert lse[1::2].isfinite().all()


def test_logits_of_minus_infinity_weigh_nothing():
    batch = blocks_of_128([(300, 8)], heads=(1, 1))
    batch.q[:, 0, 0] = 1.0
    batch.k[3, 0, 0] = batch.k[140:260, 0, 0] = float("-inf")
    check(batch, torch.ones(1, 3, 3, dtype=torch.bool))


def rising(sizes, rows, dtype=torch.bfloat16, **options):
    """For these queries the first 20 keys' logits lie 200 above those of the last block.

    By the last column: tensor cores would round the sums of further ones to its size.
    """
    batch = blocks_of_128(sizes, dtype, **options)
    batch.q[..., -1] = batch.k[..., -1] = 0.0
    batch.q[rows, :, -1] = 1.0
    batch.k[:20, :, -1] = 200 / batch.scale
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
def test_logits_far_above_those_of_the_last_block_equal_float64_within_rounding(dtype, rows):
    batch = rising([(700, 40)], rows, dtype)
    mask = random_mask(batch, 0.5)
    mask[..., 0] = True
    check(batch, mask)


def test_values_near_the_largest_number_stay_finite():
    """Sums of weights that are small enough themselves may not overflow through their values."""
    batch = rising([(400, 0)], slice(None), heads=(2, 2))
    batch.k[:20, :, -1] = 60 / batch.scale
    batch.v[:] = 1e37
    out, _ = run(batch, table_of(batch, torch.ones(2, 4, 4, dtype=torch.bool)))
    assert torch.allclose(out.float(), torch.full_like(out.float(), 1e37), rtol=1e-2)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_lies_around_a_sequence_does_not_matter(odd):
    """Memory of others lies before and after the 300 tokens, in the last block's 128 places too."""
    batch = blocks_of_128([(1000, 0)])
    for x in (batch.q, batch.k, batch.v):
        x[:200], x[500:] = odd, odd
    inner = replace(batch, blocks=QueryBlocks.of([Span(200, 300, 0)], 128, "cpu"))
    alone = replace(inner, q=batch.q[200:500], k=batch.k[200:500], v=batch.v[200:500])
    alone = replace(alone, blocks=QueryBlocks.of([Span(0, 300, 0)], 128, "cpu"))
    table = table_of(alone, torch.ones(4, 3, 3, dtype=torch.bool))
    out, lse = run(inner, table)
    expected, expected_lse = run(alone, table)
    assert torch.equal(out[200:500], expected) and torch.equal(lse[:, 200:500], expected_lse)
    assert out[:200].isnan().all() and out[500:].isnan().all()


@pytest.mark.parametrize("rows", [slice(0, 0), slice(200, 201), slice(None)])
def test_a_window_gets_what_the_whole_sequence_does(rows):
    batch = rising([(300, 10), (1000, 40), (129, 1)], rows)
    table = table_of(batch, random_mask(batch, 0.5))
    narrow, rows, blocks = in_windows(batch, [(256, 300), (128, 512), (0, 129)])
    narrow = narrow.to("cuda")
    of_windows = replace(table, rows=table.rows[blocks]).to("cuda")
    out = hopper.block_sparse_attention(
        narrow.q, narrow.k, narrow.v, narrow.blocks, *of_windows, scale=batch.scale
    )
    assert torch.equal(out, run(batch, table)[0][rows.cuda()])


def test_unaligned_tensors_take_the_plain_kernel():
    """The copy engine reads from multiples of 16 bytes only."""
    batch = blocks_of_128([(300, 20)], heads=(2, 2))
    mask = random_mask(batch, 0.5)
    batch = batch.to("cuda")
    q, k, v = (shifted(x) for x in (batch.q, batch.k, batch.v))
    check_sparse(replace(batch, q=q, k=k, v=v), mask, api.block_sparse_attention)


def shifted(x):
    """A copy that begins two bytes further."""
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def test_random_shapes_equal_float64_within_rounding():
    numbers = random.Random(0)
    for _ in range(40):
        kv_heads, head_dim = numbers.choice([1, 2, 3]), numbers.choice([64, 128])
        sizes = [(numbers.randint(1, 500), 0) for _ in range(numbers.randint(1, 3))]
        heads = (kv_heads * numbers.choice([1, 2, 7]), kv_heads)
        batch = blocks_of_128(sizes, heads=heads, head_dim=head_dim)
        mask = random_mask(batch, numbers.random())
        mask[..., 0] = True
        check(batch, mask)


def stress_cases():
    """Batches and masks that differ in what a tile's work depends on, all in the same launches."""
    for length, heads, head_dim in [(3000, (8, 2), 128), (128, (1, 1), 128), (1900, (6, 3), 64)]:
        batch = blocks_of_128([(length, 0)], heads=heads, head_dim=head_dim)
        mask = random_mask(batch, 0.4)
        mask[..., 0] = True
        yield batch, mask
    for spread in (0.0, 1e4):  # equal and huge logits
        batch = blocks_of_128([(700, 0), (129, 0)], heads=(4, 4), spread=spread)
        yield batch, random_mask(batch, 0.6)
    for rows in SOME_ROWS.values():
        batch = rising([(1500, 0)], rows, heads=(24, 8))
        yield batch, random_mask(batch, 0.6)
    uneven = blocks_of_128([(1500, 0)], heads=(8, 8))
    yield uneven, torch.rand(8, 12, 12) < torch.rand(8, 12, 1) ** 3
    single = blocks_of_128([(1500, 0)], heads=(8, 8))
    yield single, torch.eye(12, dtype=torch.bool).expand(8, 12, 12)
    gaps = blocks_of_128([(300, 0)], heads=(1, 1))
    gaps.q[:, 0, 0] = 1.0
    gaps.k[140:260, 0, 0] = float("-inf")
    yield gaps, torch.ones(1, 3, 3, dtype=torch.bool)


def launches_that_differ(cases, expected):
    """How many results of these launches are not what they were before, to the bit."""
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for case, results in zip(cases, expected, strict=True):
        for actual, first in zip(run(*case), results, strict=True):
            different += (actual.view(torch.int8) != first.view(torch.int8)).any()
    return different


def on_the_gpu(batch, mask):
    return batch.to("cuda"), Table(*table_of(batch, mask).to("cuda"))


def test_thousands_of_launches_agree_with_float64_and_to_the_bit():
    """Of mixed shapes, so that what one leaves behind in shared memory differs from the next."""
    cases = []
    for batch, mask in stress_cases():
        check(batch, mask)
        cases.append(on_the_gpu(batch, mask))
    expected = [run(*case) for case in cases]
    assert sum(launches_that_differ(cases, expected) for _ in range(500)) == 0


def test_fresh_inputs_agree_with_themselves_to_the_bit():
    for _ in range(200):
        batch = blocks_of_128([(700, 0), (400, 0)], heads=(8, 2))
        cases = [on_the_gpu(batch, random_mask(batch, random.random()))] * 5
        assert launches_that_differ(cases, [run(*cases[0])] * 5) == 0
