# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Hopper's block scores: against float64, and against themselves, as a race shows only at times."""

import pytest
import torch
from kernel_cases import exact_attention, make_batch
from test_block_scores import check, run

hopper_scores = pytest.importorskip(
    "sparsed_vllm.kernels.hopper_scores", reason="this Triton has no Gluon"
)

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0"),
]

# No, one, an even and an odd number of prompt blocks and of query blocks.
SIZES = [
    [(1, 0), (127, 100), (128, 128)],
    [(129, 129), (257, 128), (300, 256)],
    [(640, 500), (900, 0), (1500, 1400)],
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_ragged_batch_equals_float64_within_rounding(dtype, head_dim, sizes):
    batch = make_batch(sizes, 128, dtype=dtype, heads=(4, 2), head_dim=head_dim)
    check(batch, with_lse=True, score=hopper_scores.block_scores)
    check(batch, score=hopper_scores.block_scores)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (7, 1)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_groups_and_equal_and_large_logits(heads, spread):
    batch = make_batch(
        [(700, 600)], 128, dtype=torch.bfloat16, heads=heads, head_dim=128, spread=spread
    )
    check(batch, with_lse=True, score=hopper_scores.block_scores)


def test_thousands_of_launches_agree_to_the_bit():
    """Of mixed shapes, so that what one leaves behind in shared memory differs from the next."""
    cases = []
    for sizes, heads, head_dim in [
        ([(3000, 2900)], (8, 2), 128),
        ([(129, 128)], (1, 1), 128),
        ([(1900, 1500), (700, 512)], (6, 3), 64),
    ]:
        batch = make_batch(sizes, 128, dtype=torch.bfloat16, heads=heads, head_dim=head_dim)
        lse = exact_attention(batch)[1].float().to("cuda")
        cases.append((batch.to("cuda"), lse, hopper_scores.block_scores))
    expected = [run(*case) for case in cases]
    for _ in range(1000):
        for case, before in zip(cases, expected, strict=True):
            for actual, first in zip(run(*case), before, strict=True):
                assert torch.equal(actual, first)
