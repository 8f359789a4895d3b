# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Dense attention of a batch: the kernel and its twin against float64."""

import pytest
import torch
from kernel_cases import (
    COMPILED,
    DEVICE,
    LONGER,
    RAGGED,
    assert_within_rounding,
    exact_attention,
    make_batch,
    run_attention,
)

from sparsed_vllm.kernels import reference
from sparsed_vllm.kernels.dense_attention import dense_attention

IMPLEMENTATIONS = {"kernel": (dense_attention, DEVICE), "twin": (reference.dense_attention, "cpu")}


def run(batch, attend=dense_attention, device=DEVICE):
    return run_attention(batch, attend, device=device)


def check(batch):
    for actual, exact, twin in zip(
        run(batch),
        exact_attention(batch),
        run(batch, reference.dense_attention, "cpu"),
        strict=True,
    ):
        assert_within_rounding(actual, exact, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_a_ragged_batch_equals_float64_within_rounding(block_size, dtype):
    check(make_batch(RAGGED, block_size, dtype=dtype))


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_every_head_size_equals_float64_within_rounding(head_dim):
    check(make_batch([(70, 40), (1, 0)], 32, head_dim=head_dim, dtype=torch.float16))


def test_tiles_of_128_equal_float64_within_rounding():
    check(make_batch([(127, 100), (1, 1), (257, 0)], 128, dtype=torch.bfloat16))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_query_heads_read_the_key_head_of_their_group(heads):
    check(make_batch([(40, 20)], 16, heads=heads))


@pytest.mark.parametrize("spread", [0.0, 4.0, 1e4])
def test_equal_and_huge_logits_give_no_nan(spread):
    check(make_batch([(70, 40)], 32, spread=spread))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_batch_mates_do_not_change_a_sequence(name):
    batch = make_batch([(70, 40), (33, 10), (33, 33)], 32)
    together, lse = run(batch, *IMPLEMENTATIONS[name])
    apart, lse_apart = run(batch.only([1]), *IMPLEMENTATIONS[name])
    assert torch.equal(together[70:103], apart) and torch.equal(lse[:, 70:103], lse_apart)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_batch_mate_full_of_nan_changes_nothing(name):
    batch = make_batch([(33, 10), (70, 40)], 32)
    before, _ = run(batch, *IMPLEMENTATIONS[name])
    mate = batch.sequences[1]
    batch.q[mate.queries] = batch.k[mate.keys] = batch.v[mate.keys] = float("nan")
    after, _ = run(batch, *IMPLEMENTATIONS[name])
    assert torch.equal(before[:33], after[:33]) and after[33:].isnan().all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_window_gets_what_the_whole_sequence_does(name):
    batch = make_batch([(33, 10), (200, 40), (64, 1)], 32)
    whole, whole_lse = run(batch, *IMPLEMENTATIONS[name])
    part, part_lse = run(batch.windows([(32, 33), (64, 160), (0, 64)]), *IMPLEMENTATIONS[name])
    rows = torch.cat([torch.arange(*ends) for ends in [(32, 33), (97, 193), (233, 297)]])
    assert torch.equal(part, whole[rows]) and torch.equal(part_lse, whole_lse[:, rows])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "sizes", [[], [(0, 0)], [(0, 0), (40, 3), (0, 0), (0, 0), (17, 0), (0, 0)]]
)
def test_sequences_without_rows_or_keys_are_no_work(sizes, name):
    batch = make_batch(sizes, 16)
    out, lse = run(batch, *IMPLEMENTATIONS[name])
    assert out.shape == (sum(length for length, _ in sizes), 2, 32)
    assert out.isfinite().all() and lse.isfinite().all()
    nothing = batch.windows([(0, 0)] * len(sizes))
    assert run(nothing, *IMPLEMENTATIONS[name])[0].shape == (0, 2, 32)


@pytest.mark.gpu
@pytest.mark.parametrize(("block_size", "head_dim", "dtype"), COMPILED)
def test_every_shape_compiles_and_equals_float64(block_size, head_dim, dtype):
    check(make_batch(LONGER, block_size, head_dim=head_dim, dtype=dtype))
