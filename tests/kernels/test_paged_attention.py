# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A few rows over keys in pages, all or listed: the kernels and their twins against float64."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    COMPILED,
    DEVICE,
    NAN,
    assert_within_rounding,
    exact_attention,
    make_batch,
    random_mask,
    run_attention,
    tables_on,
    visible_places,
)
from pools import Pool, attending, bounded
from torch import Tensor

from sparsed_vllm.kernels import api, reference
from sparsed_vllm.kernels.paged_attention import paged_attention
from sparsed_vllm.kernels.paged_block_sparse_attention import paged_block_sparse_attention
from sparsed_vllm.kernels.splits import SplitTiles

DENSE, SPARSE = "paged_attention", "paged_block_sparse_attention"
KERNELS = {DENSE: paged_attention, SPARSE: paged_block_sparse_attention}
IMPLEMENTATIONS = {"kernel": (KERNELS, DEVICE), "twin": (vars(reference), "cpu")}
BOTH = pytest.mark.parametrize("name", KERNELS)
EITHER = pytest.mark.parametrize("how", IMPLEMENTATIONS)

LENGTHS = [1, 127, 129, 1300, 64, 256]
WINDOWS = [(0, 1), (64, 127), (0, 40), (1280, 1300), (0, 3), (128, 256)]
"""Rows of sequences of LENGTHS around the boundaries of pages; the longest one's keys are split."""


def make(lengths=LENGTHS, windows=WINDOWS, tile=64, **sizes):
    """A batch of which each sequence computes the rows of its window."""
    batch = make_batch([(length, 0) for length in lengths], tile, **sizes)
    return batch if windows is None else batch.windows(windows)


def run(name, batch, pool, tables, how="kernel", **options):
    """Attention and log-sum-exp of the sequences' rows, one sequence after another."""
    kernels, device = IMPLEMENTATIONS[how]
    where = () if name == DENSE else (tables,)
    return run_attention(batch, attending(kernels[name], pool, **options), *where, device=device)


def check(name, batch, share=0.5, **options):
    pool, mask = Pool.of(batch, **options), random_mask(batch, share)
    tables = pool.tables(batch, mask)
    visible = None if name == DENSE else visible_places(batch, mask)
    for actual, exact, twin in zip(
        run(name, batch, pool, tables),
        exact_attention(batch, visible),
        run(name, batch, pool, tables, "twin"),
        strict=True,
    ):
        assert_within_rounding(actual, exact, twin)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_ragged_batch_equals_float64_within_rounding(dtype, name):
    check(name, make(dtype=dtype))


@BOTH
@pytest.mark.parametrize("tile", [16, 32, 128])
def test_every_tile_equals_float64_within_rounding(tile, name):
    windows = [(0, 1), (0, 127), (128, 129), (1152, 1300), (0, 30), (0, 256)]
    check(name, make(windows=windows, tile=tile, dtype=torch.bfloat16), heads_first=True)


@pytest.mark.parametrize(("tile", "block_size"), [(64, 16), (128, 32)])
def test_lists_of_more_rows_than_a_key_block_has_equal_float64(tile, block_size):
    windows = [(0, 1), (0, 127), (128, 129), (1152, 1300), (0, 30), (0, 256)]
    sizes = {"query_block_size": tile, "dtype": torch.bfloat16}
    check(SPARSE, make(windows=windows, tile=block_size, **sizes))


@BOTH
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_every_head_size_equals_float64_within_rounding(head_dim, name):
    batch = make([140, 1100], [(64, 140), (1088, 1100)], head_dim=head_dim, dtype=torch.float16)
    check(name, batch)


@BOTH
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (7, 1), (8, 1), (14, 2), (3, 3)])
def test_query_heads_read_the_key_head_of_their_group(heads, name):
    check(name, make([150, 1050], [(128, 150), (0, 64)], heads=heads, dtype=torch.bfloat16))


TWO_TILES = [(128, 200), (0, 70)]
"""Rows of each of two sequences that fill a tile and a part of the next."""


@BOTH
@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_equal_and_wide_logits_equal_float64_within_rounding(spread, name):
    check(name, make([200, 1100], TWO_TILES, spread=spread))


@BOTH
def test_huge_logits_are_known_to_a_unit_in_their_last_place(name):
    """Where two of them are close, that decides, and a twin may be lucky."""
    batch = make([200, 1100], TWO_TILES, spread=1e4)
    pool, mask = Pool.of(batch), random_mask(batch, 1)
    out, lse = (x.cpu() for x in run(name, batch, pool, pool.tables(batch, mask)))
    exact_out, exact_lse = exact_attention(batch)
    unit = float(exact_lse.abs().max()) * torch.finfo(torch.float32).eps
    assert unit < 0.01
    assert (out - exact_out).abs().max() < 2 * unit * batch.v.nan_to_num().abs().max()
    assert (lse - exact_lse).abs().max() < 4 * unit  # the product, its scale and its unit round


def test_short_and_empty_lists_equal_float64_within_rounding():
    for share in (0, 0.1, 1):
        check(SPARSE, make(tile=16, windows=None, lengths=[1, 40, 130]), share)


def test_a_list_without_a_block_gives_zeros():
    batch = make([130, 1100], [(0, 40), (0, 64)])
    pool, mask = Pool.of(batch), random_mask(batch, 0)
    out, lse = run(SPARSE, batch, pool, pool.tables(batch, mask))
    assert not out.any() and (lse == -torch.inf).all()


def equal(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def everything(name, batch):
    """What run takes: keys in pages and, for lists, tables."""
    pool, mask = Pool.of(batch), random_mask(batch, 0.5)
    return name, batch, pool, pool.tables(batch, mask)


@BOTH
@EITHER
def test_batch_mates_do_not_change_a_sequence(how, name):
    of = everything(name, make([300, 1300, 1500], [(64, 164), (0, 20), (1472, 1500)]))
    out, lse = run(*of, how)
    apart = run(name, of[1].only([1]), *of[2:], how)
    assert equal(apart, (out[100:120], lse[:, 100:120]))


@BOTH
def test_the_bounds_of_a_grid_do_not_change_a_sequence(name):
    of = everything(name, make(dtype=torch.bfloat16))
    pool = of[2]
    wide = torch.cat([pool.pages, torch.full((len(pool.pages), 40), 10**9, dtype=torch.int32)], 1)
    assert equal(run(*of), run(name, of[1], replace(pool, pages=wide), of[3], seen=bounded))


@BOTH
def test_what_memory_held_before_does_not_show(name, monkeypatch):
    of = everything(name, make())
    before, empty = run(*of), Tensor.new_empty

    def poisoned(*sizes, **options):
        x = empty(*sizes, **options)
        return x.fill_(NAN if x.is_floating_point() else torch.iinfo(x.dtype).max)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    assert equal(run(*of), before)


@BOTH
@EITHER
def test_a_batch_mate_full_of_nan_changes_nothing(how, name):
    of = everything(name, make([1100, 1300], [(64, 84), (0, 30)]))
    batch, pool = of[1], of[2]
    before, _ = run(*of, how)
    mate = batch.sequences[1]
    batch.q[mate.queries] = NAN
    pool.whole[pool.pages[mate.page_row, :11].long()] = NAN
    after, _ = run(*of, how)
    assert torch.equal(before[:20], after[:20]) and after[20:].isnan().all()


@BOTH
def test_a_nan_of_a_sequence_s_own_is_seen_wherever_its_split_is(name):
    of = everything(name, make([1300], [(0, 20)]))
    pool = of[2]
    tables = pool.tables(of[1], random_mask(of[1], 1))
    pool.whole[pool.pages[0 if pool.pages[0, 0] < 10**9 else 1, 0].long(), 0, 5] = NAN
    out, lse = run(name, of[1], pool, tables)
    assert out.isnan().all() and lse.isnan().all()


@BOTH
@EITHER
@pytest.mark.parametrize("sizes", [[], [0], [0, 40, 0, 0, 130, 0]])
def test_sequences_without_rows_or_keys_are_no_work(sizes, how, name):
    of = everything(name, make(sizes, None, tile=16))
    out, lse = run(*of, how)
    assert out.shape == (sum(sizes), 2, 32) and not out.isnan().any() and not lse.isnan().any()
    nothing = of[1].windows([(0, 0)] * len(sizes))
    assert run(name, nothing, *of[2:], how)[0].shape == (0, 2, 32)


@BOTH
def test_a_long_sequence_is_split_and_a_short_one_is_not(name, monkeypatch):
    grids = []
    module = __import__(f"sparsed_vllm.kernels.{name}", fromlist=["Parts"])
    of = module.Parts.of

    def noting(*args):
        grids.append(of(*args))
        return grids[-1]

    monkeypatch.setattr(module.Parts, "of", noting)
    first_split = {DENSE: 897, SPARSE: 961}[name]  # two parts of 512 keys, of whole pages or blocks
    for length in (first_split - 1, first_split):
        of_run = everything(name, make([length], [(0, 20)]))
        run(name, of_run[1], of_run[2], of_run[2].tables(of_run[1], random_mask(of_run[1], 1)))
    short, long = grids
    assert not len(short.sums) and (short.counts == 1).all()
    assert len(long.sums) and (long.counts == 2).all()


@BOTH
def test_the_api_runs_the_kernel_on_a_gpu_and_its_twin_elsewhere(name):
    of = everything(name, make([300], [(0, 20)]))
    batch = replace(of[1], layout=of[1].layout)
    where = () if name == DENSE else (of[3],)
    asked = run_attention(batch, attending(getattr(api, name), of[2]), *where, device=DEVICE)
    assert equal(asked, run(*of, "kernel" if DEVICE == "cuda" else "twin"))


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize(("tile", "head_dim", "dtype"), COMPILED)
def test_every_shape_compiles_and_equals_float64(tile, head_dim, dtype, name):
    windows = [(0, 1), (0, 127), (128, 129), (1152, 1300), (0, 30), (0, 256)]
    check(name, make(windows=windows, tile=tile, heads=(14, 2), head_dim=head_dim, dtype=dtype))


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("heads", [(32, 32), (28, 4)])
def test_a_replayed_graph_computes_what_its_columns_say(heads, name):
    """Captured with bounds and replayed for other sequences than it was captured with."""
    batch = make(
        tile=128,
        windows=[(0, 1), (0, 127), (0, 40), (1152, 1300), (0, 3), (0, 128)],
        heads=heads,
        head_dim=128,
        dtype=torch.bfloat16,
    )
    of = everything(name, batch)
    expected = run(*of)
    gpu, pool = batch.to("cuda"), of[2].to("cuda")
    tables = pool.pages if name == DENSE else tables_on("cuda", of[3])
    layout = bounded(gpu.layout)
    pages = torch.full((len(pool.pages), 60), 10**9, dtype=torch.int32, device="cuda")
    pages[:, : pool.pages.shape[1]] = pool.pages
    tables = pages if name == DENSE else replace(tables, pages=pages)
    truth = layout.columns.clone()
    out = torch.full_like(gpu.q, NAN)
    layout.columns.zero_()

    def call():
        return KERNELS[name](
            gpu.q, *pool.halves, layout, tables, scale=gpu.scale, out=out, return_lse=True
        )

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = call()
    layout.columns.copy_(truth)
    graph.replay()
    rows = batch.rows.cuda()
    assert equal((out[rows], lse[:, rows]), expected)


@pytest.mark.gpu
@BOTH
def test_many_launches_agree_to_the_bit(name):
    sizes = {"heads": (8, 4), "head_dim": 128, "dtype": torch.bfloat16, "tile": 128}
    of = everything(name, make([6000, 129], [(5888, 6000), (0, 33)], **sizes))
    first = run(*of)
    for _ in range(50):
        assert equal(run(*of), first)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("rows", [64, 128])
def test_every_way_to_cut_equals_float64(rows, keys):
    batch = make([9000], [(8960, 9000)], heads=(8, 2), head_dim=128, dtype=torch.bfloat16)
    pool = Pool.of(batch)
    tiles = SplitTiles(rows, keys, rows // 16, 2, 132)

    def cut(*args, **options):
        return paged_attention(*args, **options, tiles=tiles)

    actual = run_attention(batch, attending(cut, pool))
    twin = run(DENSE, batch, pool, None, "twin")
    for found, exact, slow in zip(actual, exact_attention(batch), twin, strict=True):
        assert_within_rounding(found, exact, slow)
