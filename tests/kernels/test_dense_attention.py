# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Dense attention of a packed batch: the kernel and its twin against float64."""

import pytest
import torch
from kernel_cases import (
    COMPILED,
    DEVICE,
    LONGER,
    RAGGED,
    assert_within_rounding,
    exact_attention,
    in_windows,
    make_batch,
)

from sparsed_vllm.kernels import reference
from sparsed_vllm.kernels.dense_attention import dense_attention

IMPLEMENTATIONS = {"kernel": (dense_attention, DEVICE), "twin": (reference.dense_attention, "cpu")}


def run(batch, attend=dense_attention, device=DEVICE):
    """Into memory full of NaN."""
    batch = batch.to(device)
    out = torch.full_like(batch.q, float("nan"))
    result, lse = attend(
        batch.q, batch.k, batch.v, batch.blocks, scale=batch.scale, out=out, return_lse=True
    )
    assert result is out
    return result, lse


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


def test_blocks_of_128_equal_float64_within_rounding():
    check(make_batch([(127, 100), (1, 1), (257, 0)], 128, dtype=torch.bfloat16))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_query_heads_read_the_key_head_of_their_group(heads):
    check(make_batch([(40, 20)], 16, heads=heads))


@pytest.mark.parametrize("spread", [0.0, 4.0, 1e4])
def test_equal_and_huge_logits_give_no_nan(spread):
    check(make_batch([(70, 40)], 32, spread=spread))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_batch_mates_do_not_change_a_sequence(name):
    attend, device = IMPLEMENTATIONS[name]
    batch = make_batch([(33, 10), (70, 40)], 32)
    alone = make_batch([(33, 10)], 32)
    for mine, theirs in zip((alone.q, alone.k, alone.v), (batch.q, batch.k, batch.v), strict=True):
        mine.copy_(theirs[:33])
    (together, _), (apart, _) = run(batch, attend, device), run(alone, attend, device)
    assert torch.equal(together[:33], apart)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_window_gets_what_the_whole_sequence_does(name):
    batch = make_batch([(33, 10), (200, 40), (64, 1)], 32)
    narrow, rows, _ = in_windows(batch, [(32, 33), (64, 160), (0, 64)])
    (whole, whole_lse), (part, part_lse) = (run(x, *IMPLEMENTATIONS[name]) for x in (batch, narrow))
    assert torch.equal(part, whole[rows]) and torch.equal(part_lse, whole_lse[:, rows])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_empty_batch_is_no_work(name):
    out, lse = run(make_batch([], 32), *IMPLEMENTATIONS[name])
    assert out.shape == (0, 2, 32) and lse.shape == (2, 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("block_size", "head_dim", "dtype"), COMPILED)
def test_every_shape_compiles_and_equals_float64(block_size, head_dim, dtype):
    check(make_batch(LONGER, block_size, head_dim=head_dim, dtype=dtype))
