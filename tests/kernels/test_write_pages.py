# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Keys and values written to pages: the kernel and its twin."""

import pytest
import torch
from kernel_cases import DEVICE, NAN

from sparsed_vllm.kernels import api, reference
from sparsed_vllm.kernels.layout import PAGE
from sparsed_vllm.kernels.write_pages import write_pages

IMPLEMENTATIONS = {"kernel": (write_pages, DEVICE), "twin": (reference.write_pages, "cpu")}
EITHER = pytest.mark.parametrize("name", IMPLEMENTATIONS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])

NUM_PAGES = 5


def tokens(num_rows, heads=3, head_dim=32, dtype=torch.float32):
    """k and v as slices of a projection's result, of different strides."""
    fused = torch.randn(num_rows, 3 * heads, head_dim).to(dtype)
    return fused[:, heads : 2 * heads], fused[:, 2 * heads :].contiguous()


def places(num_rows):
    """Pages and offsets, no two the same."""
    chosen = torch.randperm(NUM_PAGES * PAGE)[:num_rows]
    return chosen // PAGE, chosen % PAGE


def write(name, k, v, *where):
    """Keys and values of pages that held -1, on the CPU."""
    call, device = IMPLEMENTATIONS[name]
    pool = torch.full((NUM_PAGES, 3, PAGE, *k.shape[1:]), -1.0, dtype=k.dtype, device=device)
    fused = torch.cat([k, v], 1).to(device)
    k, v = fused.split(k.shape[1], dim=1)
    call(k, v, pool[:, 0], pool[:, 2], *(None if x is None else x.to(device) for x in where))
    assert (pool[:, 1] == -1).all()
    return pool[:, 0].cpu(), pool[:, 2].cpu()


@EITHER
@DTYPES
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 200])
def test_rows_are_in_their_places_and_nothing_else_is_written(num_rows, dtype, name):
    k, v = tokens(num_rows, dtype=dtype)
    pages, offsets = places(num_rows)
    for half, given in zip(write(name, k, v, pages, offsets), (k, v), strict=True):
        assert torch.equal(half[pages, offsets], given)
        half[pages, offsets] = -1
        assert (half == -1).all()


@EITHER
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_some_rows_may_be_named_in_any_order(index, name):
    k, v = tokens(50)
    pages, offsets = (x.to(index) for x in places(20))
    rows = torch.randperm(50)[:20].to(index)
    keys, values = write(name, k, v, pages, offsets, rows)
    assert torch.equal(keys[pages.long(), offsets.long()], k[rows.long()])
    assert torch.equal(values[pages.long(), offsets.long()], v[rows.long()])


@EITHER
@pytest.mark.parametrize("named", [False, True])
def test_a_row_without_a_page_is_neither_read_nor_written(named, name):
    k, v = tokens(40)
    pages, offsets = places(40)
    rows = torch.arange(40) if named else None
    skipped = torch.rand(40) < 0.5
    k[skipped], v[skipped] = NAN, NAN
    given = torch.where(skipped, -1, pages), torch.where(skipped, 1 << 30, offsets)
    for half, whole in zip(write(name, k, v, *given, rows), (k, v), strict=True):
        assert torch.equal(half[pages, offsets][~skipped], whole[~skipped])
        assert (half[pages, offsets][skipped] == -1).all() and not half.isnan().any()


@EITHER
@DTYPES
def test_only_a_value_that_is_nan_becomes_0(dtype, name):
    k, v = tokens(3, dtype=dtype)
    k[0, 0, :3] = v[0, 0, :3] = torch.tensor([NAN, torch.inf, -torch.inf])
    pages, offsets = places(3)
    before = v.clone()
    keys, values = write(name, k, v, pages, offsets)
    assert keys[pages[0], offsets[0], 0, 0].isnan()
    assert values[pages[0], offsets[0], 0, :3].tolist() == [0, torch.inf, -torch.inf]
    assert torch.equal(v.nan_to_num(), before.nan_to_num()), "v is only read"


@EITHER
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_every_head_size_is_written_whole(head_dim, name):
    k, v = tokens(20, 2, head_dim, torch.bfloat16)
    where = places(20)
    keys, values = write(name, k, v, *where)
    assert torch.equal(keys[where], k) and torch.equal(values[where], v)


@EITHER
def test_no_rows_are_no_work(name):
    k, v = tokens(3)
    nothing = torch.empty(0, dtype=torch.int64)
    assert all((half == -1).all() for half in write(name, k, v, nothing, nothing))


def test_the_api_refuses_what_does_not_fit():
    k, v = tokens(4)
    halves = torch.zeros(NUM_PAGES, 2, PAGE, 3, 32)
    keys, values, (pages, offsets) = halves[:, 0], halves[:, 1], places(4)
    api.write_pages(k, v, keys, values, pages, offsets)
    assert torch.equal(keys[pages, offsets], k)
    for wrong in (
        (k, v[:, :2], keys, values, pages, offsets),
        (k, v, keys.bfloat16(), values, pages, offsets),
        (k, v, keys, values.contiguous().transpose(1, 2).contiguous().transpose(1, 2), pages),
        (k[:3], v[:3], keys, values, pages, offsets),
        (k, v, keys, values, pages, offsets[:3]),
        (k, v, keys, values, pages.float(), offsets),
    ):
        with pytest.raises((AssertionError, TypeError)):
            api.write_pages(*wrong)


@pytest.mark.gpu
def test_a_replayed_graph_writes_what_its_buffers_say():
    k, v = (x.cuda() for x in tokens(64, dtype=torch.bfloat16))
    halves = torch.zeros(NUM_PAGES, 2, PAGE, 3, 32, dtype=torch.bfloat16, device="cuda")
    where = torch.full((2, 64), -1, device="cuda")
    write_pages(k, v, halves[:, 0], halves[:, 1], *where)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write_pages(k, v, halves[:, 0], halves[:, 1], *where)
    graph.replay()
    assert not halves.any()
    pages, offsets = (x.cuda() for x in places(30))
    where[0, :30], where[1, :30] = pages, offsets
    graph.replay()
    assert torch.equal(halves[pages, 0, offsets], k[:30]) and halves[:, 0].any(3).sum() == 90
