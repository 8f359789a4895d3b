# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Attention over lists of key blocks: the kernel and its twin against float64."""

import pytest
import torch
from kernel_cases import (
    COMPILED,
    DEVICE,
    LONGER,
    RAGGED,
    assert_within_rounding,
    check_sparse,
    exact_attention,
    make_batch,
    random_mask,
    run_attention,
    tables_of,
)

from sparsed_vllm.kernels import reference
from sparsed_vllm.kernels.block_sparse_attention import block_sparse_attention
from sparsed_vllm.kernels.layout import PAGE, BatchLayout, BlockTables

IMPLEMENTATIONS = {
    "kernel": (block_sparse_attention, DEVICE),
    "twin": (reference.block_sparse_attention, "cpu"),
}


def run(batch, tables, attend=block_sparse_attention, device=DEVICE):
    return run_attention(batch, attend, tables, device=device)


def check(batch, share=0.5, **options):
    check_sparse(batch, random_mask(batch, share), block_sparse_attention, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_a_ragged_batch_equals_float64_within_rounding(block_size, dtype):
    check(make_batch(RAGGED, block_size, dtype=dtype))


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_every_head_size_equals_float64_within_rounding(head_dim):
    check(make_batch([(70, 40), (1, 0)], 16, head_dim=head_dim, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_128_equal_float64_within_rounding(dtype):
    check(make_batch([(127, 100), (1, 1), (257, 0)], 128, dtype=dtype))


FINER = [(64, 16), (128, 16), (128, 32), (128, 64)]
"""(query rows, key block) of lists that stand for more rows than their blocks have tokens."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "block_size"), FINER)
def test_lists_of_more_rows_than_a_key_block_has_equal_float64(rows, block_size, dtype):
    batch = make_batch(
        [(127, 100), (1, 1), (257, 0)], block_size, query_block_size=rows, dtype=dtype
    )
    check(batch)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_query_heads_have_their_own_lists_and_their_groups_keys(heads):
    check(make_batch([(100, 20)], 16, heads=heads))


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_lists_of_any_length_equal_float64_within_rounding(share):
    check(make_batch([(150, 20)], 16), share)


def test_ids_may_be_int32():
    check(make_batch([(100, 20)], 16), dtype=torch.int32, poison=2**31 - 1)


@pytest.mark.parametrize("spread", [0.0, 4.0, 1e4])
def test_equal_and_huge_logits_give_no_nan(spread):
    check(make_batch([(70, 40)], 16, spread=spread))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_empty_list_gives_zeros_and_no_mass(name):
    batch = make_batch([(40, 8), (1, 0)], 16)
    mask = random_mask(batch, 1.0)
    mask[1] = False
    out, lse = run(batch, tables_of(batch, mask), *IMPLEMENTATIONS[name])
    assert (out[:, 1] == 0).all() and (lse[1] == float("-inf")).all()
    assert out[:, 0].isfinite().all() and lse[0].isfinite().all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nothing_but_empty_lists_is_no_error(name):
    batch = make_batch([(40, 8)], 32)
    out, _ = run(batch, tables_of(batch, random_mask(batch, 0.0)), *IMPLEMENTATIONS[name])
    assert (out == 0).all()


@pytest.mark.parametrize("block_size", [16, 128])
def test_lists_of_all_blocks_give_dense_attention(block_size):
    batch = make_batch([(150, 100), (33, 0)], block_size, heads=(2, 2))
    sparse = run(batch, tables_of(batch, random_mask(batch, 1.0)))
    dense = run_attention(batch, reference.dense_attention, device="cpu")
    for actual, exact, twin in zip(sparse, exact_attention(batch), dense, strict=True):
        assert_within_rounding(actual, exact, twin)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_batch_mates_do_not_change_a_sequence(name):
    batch = make_batch([(70, 40), (133, 10), (33, 33)], 16)
    tables = tables_of(batch, random_mask(batch, 0.5))
    together, lse = run(batch, tables, *IMPLEMENTATIONS[name])
    apart, lse_apart = run(batch.only([1]), tables, *IMPLEMENTATIONS[name])
    assert torch.equal(together[70:203], apart) and torch.equal(lse[:, 70:203], lse_apart)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_batch_mate_full_of_nan_changes_nothing(name):
    batch = make_batch([(33, 10), (70, 40)], 16)
    tables = tables_of(batch, random_mask(batch, 1.0))
    before, _ = run(batch, tables, *IMPLEMENTATIONS[name])
    mate = batch.sequences[1]
    batch.q[mate.queries] = batch.k[mate.keys] = batch.v[mate.keys] = float("nan")
    after, _ = run(batch, tables, *IMPLEMENTATIONS[name])
    assert torch.equal(before[:33], after[:33]) and after[33:].isnan().all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_window_gets_what_the_whole_sequence_does(name):
    batch = make_batch([(33, 10), (200, 40), (64, 1)], 32)
    tables = tables_of(batch, random_mask(batch, 0.5))
    whole, whole_lse = run(batch, tables, *IMPLEMENTATIONS[name])
    narrow = batch.windows([(32, 33), (64, 160), (0, 64)])
    part, part_lse = run(narrow, tables, *IMPLEMENTATIONS[name])
    rows = torch.cat([torch.arange(*ends) for ends in [(32, 33), (97, 193), (233, 297)]])
    assert torch.equal(part, whole[rows]) and torch.equal(part_lse, whole_lse[:, rows])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "sizes", [[], [(0, 0)], [(0, 0), (40, 3), (0, 0), (0, 0), (17, 0), (0, 0)]]
)
def test_sequences_without_rows_or_keys_are_no_work(sizes, name):
    batch = make_batch(sizes, 16)
    tables = tables_of(batch, random_mask(batch, 1.0))
    out, lse = run(batch, tables, *IMPLEMENTATIONS[name])
    assert out.shape == (sum(length for length, _ in sizes), 2, 32)
    assert out.isfinite().all() and lse.isfinite().all()
    nothing = batch.windows([(0, 0)] * len(sizes))
    assert run(nothing, tables, *IMPLEMENTATIONS[name])[0].shape == (0, 2, 32)


@pytest.mark.gpu
@pytest.mark.parametrize(("block_size", "head_dim", "dtype"), COMPILED)
def test_every_shape_compiles_and_equals_float64(block_size, head_dim, dtype):
    check(make_batch(LONGER, block_size, head_dim=head_dim, dtype=dtype))
    options = {"head_dim": head_dim, "dtype": dtype}
    check(make_batch(LONGER, block_size, query_block_size=128, **options))


@pytest.mark.gpu
def test_offsets_past_int32_are_reached():
    """128k tokens x 32 heads of 128 as slices of a fused projection: 1.6e9 elements."""
    length, size, heads = 131072 + 5, 128, 32
    fused = torch.randn(length, 3 * heads, 128, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.split(heads, dim=1)
    layout = BatchLayout.of(
        size,
        "cuda",
        query_starts=[0],
        num_rows=[length],
        first_rows=[0],
        key_starts=[0],
        key_lens=[length],
        page_rows=[0],
    )
    last = layout.num_tiles - 1
    ids = torch.tensor([0, last], dtype=torch.int16, device="cuda")
    kept = ids.expand(last + 1, 1, heads, 2)
    num_kept = torch.full_like(kept[..., 0], 2)
    pages = torch.arange(last + 1, dtype=torch.int32, device="cuda")[None]
    tables = BlockTables(kept, num_kept, pages)
    assert tables.query_block_size == PAGE == size
    out = block_sparse_attention(q, k, v, layout, tables, scale=128**-0.5)
    seen = torch.cat([torch.arange(size), torch.arange(last * size, length)]).cuda()
    logits = torch.einsum("qhd,khd->hqk", q[-5:].double(), k[seen].double()) * 128**-0.5
    exact = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[seen].double())
    assert (out[-5:].double() - exact).abs().max() < 0.01
