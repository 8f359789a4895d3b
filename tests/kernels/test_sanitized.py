# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Every kernel once or twice at small shapes, for tools/sanitize.sh: it is slow by its nature."""

import pytest
import torch
from kernel_cases import make_batch, random_mask, run_sparse, table_of

from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.block_sparse_attention import block_sparse_attention
from sparsed_vllm.kernels.choice import Choice, Forbidden

pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer]

SIZES = [(300, 40), (129, 0), (1, 0)]


@pytest.mark.parametrize(("block_size", "head_dim"), [(128, 128), (128, 64), (32, 32)])
@pytest.mark.parametrize("spread", [1.0, 1e4])
@pytest.mark.parametrize("attend", [api.block_sparse_attention, block_sparse_attention])
def test_sparse_attention(attend, spread, block_size, head_dim):
    """The kernel that is chosen here, for Hopper where it can be, and the plain one.

    spread: of logits; the wide one makes the kernel for Hopper take tiles again
    """
    sizes = {"head_dim": head_dim, "dtype": torch.bfloat16, "heads": (4, 2), "spread": spread}
    batch = make_batch(SIZES, block_size, **sizes)
    out, _ = run_sparse(batch, table_of(batch, random_mask(batch, 0.5)), attend)
    torch.cuda.synchronize()
    assert not out.isnan().any()


@pytest.mark.parametrize(("block_size", "head_dim"), [(128, 128), (32, 64)])
def test_a_recording_step(block_size, head_dim):
    batch = make_batch(SIZES, block_size, head_dim=head_dim, dtype=torch.bfloat16).to("cuda")
    blocks, options = batch.blocks, {"scale": batch.scale}
    _, lse = api.dense_attention(batch.q, batch.k, batch.v, blocks, return_lse=True, **options)
    scores = api.block_scores(batch.q, batch.k, lse, blocks, **options)
    shape = (blocks.num_blocks, batch.q.shape[1])
    kept = torch.empty(*shape, blocks.most_kept, dtype=torch.int16, device="cuda")
    num_kept = torch.empty(shape, dtype=torch.int32, device="cuda")
    rows = torch.arange(blocks.num_blocks, device="cuda")
    api.select_blocks(*scores, blocks, kept, num_kept, rows)
    torch.cuda.synchronize()
    assert (num_kept >= 1).all() and (num_kept <= blocks.most_kept).all()


@pytest.mark.parametrize(
    "choice",
    [
        Choice(confidence="margin"),
        Choice(1.0, confidence="entropy"),
        Choice(1.0, tempered=True, top_p=0.9, top_k=50),
    ],
    ids=str,
)
def test_tokens_are_chosen(choice):
    logits = torch.randn(3, 9001, device="cuda", dtype=torch.bfloat16)
    early = torch.tensor([True, False, True], device="cuda")
    forbidden = Forbidden(7, torch.tensor([9000], device="cuda"), early)
    tokens, *_ = api.choose_tokens(logits, choice, forbidden)
    assert (tokens >= 0).all() and (tokens < 9001).all()
