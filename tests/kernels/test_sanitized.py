# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Every kernel once or twice at small shapes, for tools/sanitize.sh: it is slow by its nature."""

import canvas_cases
import pytest
import torch
from kernel_cases import (
    make_batch,
    random_mask,
    run_attention,
    scattered_tables,
    tables_of,
    tables_on,
)
from paged_cases import make_case
from pools import Pool, attending

from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.block_sparse_attention import block_sparse_attention
from sparsed_vllm.kernels.choice import Choice, Forbidden, Noise

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
    out, _ = run_attention(batch, attend, tables_of(batch, random_mask(batch, 0.5)))
    torch.cuda.synchronize()
    assert not out.isnan().any()


@pytest.mark.parametrize(("block_size", "head_dim"), [(128, 128), (32, 64)])
@pytest.mark.parametrize("mass", [None, 0.9])
def test_a_recording_step(mass, block_size, head_dim):
    batch = make_batch(SIZES, block_size, head_dim=head_dim, dtype=torch.bfloat16, mass=mass)
    most = batch.selection.most_kept
    tables, batch = tables_on("cuda", scattered_tables(batch, most)), batch.to("cuda")
    of, scale = (batch.layout, batch.selection), batch.scale
    _, lse = api.dense_attention(
        batch.q, batch.k, batch.v, batch.layout, scale=scale, return_lse=True
    )
    scores = api.block_scores(batch.q, batch.k, lse, *of, scale=scale)
    api.select_blocks(*scores, *of, tables)
    torch.cuda.synchronize()
    for sequence in batch.sequences:
        counts = tables.num_kept[tables.rows(sequence)]
        assert (counts >= 1).all() and (counts <= most).all()


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
    noise = Noise(*torch.arange(9, device="cuda").split(3)) if choice.temperature else None
    tokens, *_ = api.choose_tokens(logits, choice, forbidden, noise)
    assert (tokens >= 0).all() and (tokens < 9001).all()


def test_uniform_numbers_are_drawn():
    numbers = api.draw_uniform(Noise(*torch.arange(390, device="cuda").split(130)))
    assert (numbers > 0).all() and (numbers < 1).all()


@pytest.mark.parametrize(("head_dim", "tile"), [(128, 128), (64, 64), (32, 16)])
@pytest.mark.parametrize("heads", [(4, 4), (7, 1)])
def test_a_light_step(heads, head_dim, tile):
    """Keys and values to pages, then a few rows over all pages and over lists; one is split."""
    sizes = {"heads": heads, "head_dim": head_dim, "dtype": torch.bfloat16}
    batch = make_batch([(1300, 0), (129, 0), (1, 0)], tile, **sizes)
    batch = batch.windows([(1152, 1300), (0, 40), (0, 1)])
    pool, mask = Pool.of(batch), random_mask(batch, 0.5)
    written = pool.to("cuda")
    k, v = (torch.randn(50, *batch.k.shape[1:], device="cuda").to(batch.k.dtype) for _ in range(2))
    places = torch.arange(50, device="cuda")
    api.write_pages(k, v, *written.halves, places % 3 - 1, places)
    torch.cuda.synchronize()
    for attend, where in (
        (api.paged_attention, ()),
        (api.paged_block_sparse_attention, (pool.tables(batch, mask),)),
    ):
        out, _ = run_attention(batch, attending(attend, pool), *where)
        torch.cuda.synchronize()
        assert not out.isnan().any()


@pytest.mark.parametrize(("head_dim", "dtype"), [(128, torch.bfloat16), (32, torch.float32)])
def test_mass_is_added_to_tokens(head_dim, dtype):
    arguments = make_case([(300, 70), (129, 0), (1, 1)], head_dim=head_dim, dtype=dtype).on("cuda")
    api.token_mass(**arguments)
    torch.cuda.synchronize()
    assert not arguments["mass"].isnan().any()


def test_dropping_nans():
    whole = torch.full((300, 5, 64), torch.nan, dtype=torch.bfloat16, device="cuda")
    api.drop_nans(whole[1:, 1:4])
    torch.cuda.synchronize()
    assert int(whole.isnan().sum()) == whole.numel() - 299 * 3 * 64


@pytest.mark.parametrize("draws", [False, True])
def test_canvases_are_opened_filled_and_handed_out(draws):
    case = canvas_cases.make_case(3)
    state, columns = case.on("cuda")
    rows = api.open_canvases(state, columns)
    uniform = case.uniform.cuda() if draws else None
    api.fill_canvases(state, columns, rows, *case.results("cuda"), uniform)
    ids = torch.zeros(7 * 700, dtype=torch.int32, device="cuda")
    api.write_ids(state, columns, ids, 5, None)
    taken = api.take_canvases(state, columns, None)
    torch.cuda.synchronize()
    assert (taken.places >= 0).all() and (taken.counts >= 0).all()
