# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Keys, values and tables in one page, and how they are written and read."""

import pytest
import torch

from sparsed_vllm.kernels.layout import PAGE
from sparsed_vllm.pages import PageLayout, PageWrites
from sparsed_vllm.tables import TablePages


def layout_of(dtype=torch.float32, *, heads=3, kv_heads=1, size=16, ids=2, holds_kv=True):
    tables = TablePages(heads, ids, torch.int16)
    return PageLayout(kv_heads, size, dtype, holds_kv, tables)


def cache_of(layout, num_pages, gap=0):
    """A layer's cache as vLLM hands it out: other layers' pages between."""
    width = layout.bytes_per_token // layout.dtype.itemsize
    whole = torch.zeros(num_pages, 1, PAGE * (1 + gap), width, dtype=layout.dtype)
    return whole[:, :, :PAGE]


def tables_of(layout, cache, block_size):
    pages = torch.zeros(1, 1, dtype=torch.int32)
    tables = layout.block_tables(cache, pages, block_size)
    return tables.kept, tables.num_kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("gap", [0, 2])
def test_keys_values_and_tables_have_numbers_of_their_own(dtype, block_size, gap):
    layout = layout_of(dtype, kv_heads=2)
    cache = cache_of(layout, 3, gap)
    keys, values = layout.keys(cache), layout.values(cache)
    kept, num_kept = tables_of(layout, cache, block_size)
    assert keys.shape == values.shape == (3, PAGE, 2, 16)
    parts = [(keys, 1.5), (values, 2.5), (kept, 3), (num_kept, 4)]
    for part, number in parts:
        part.fill_(number)
    for part, number in parts:
        assert (part == number).all()


def test_every_token_of_every_head_has_numbers_of_its_own():
    layout = layout_of(kv_heads=2)
    cache = cache_of(layout, 2, gap=1)
    keys, values = layout.keys(cache), layout.values(cache)
    numbers = torch.arange(2.0 * keys.numel())
    keys.copy_(numbers[: keys.numel()].view_as(keys))
    values.copy_(numbers[keys.numel() :].view_as(values))
    assert torch.equal(torch.cat([keys.flatten(), values.flatten()]), numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_s_contents_stay_within_the_page(dtype):
    layout = layout_of(dtype)
    cache = cache_of(layout, 3)
    layout.keys(cache)[1], layout.values(cache)[1] = 1, 1
    for part in tables_of(layout, cache, 16):
        part[1] = -1
    assert not cache[[0, 2]].any()
    assert cache[1].any()


def test_a_page_without_keys_is_its_tables():
    with_kv, without = layout_of(kv_heads=2), layout_of(holds_kv=False)
    assert without.bytes_per_token == without.tables.bytes_per_token
    assert with_kv.bytes_per_token - without.bytes_per_token == 2 * 2 * 16 * 4
    with pytest.raises(AssertionError):
        without.keys(cache_of(without, 1))


def test_a_page_is_as_large_as_vllm_is_told():
    layout = layout_of(kv_heads=2)
    assert layout.empty(2, torch.device("cpu"))[0].nbytes == PAGE * layout.bytes_per_token


def test_rows_are_written_to_their_places_and_nowhere_else():
    layout = layout_of(size=16)
    cache = cache_of(layout, 3)
    keys, values = layout.keys(cache), layout.values(cache)
    k, v = torch.rand(2, 4, 1, 16) + 1
    writes = PageWrites(torch.tensor([3, 1]), torch.tensor([2, 0]), torch.tensor([127, 5]))
    writes.write(k, v, keys, values)
    for half, given in ((keys, k), (values, v)):
        assert torch.equal(half[2, 127], given[3])
        assert torch.equal(half[0, 5], given[1])
        assert half.any(dim=(2, 3)).sum() == 2
    assert not any(part.any() for part in tables_of(layout, cache, 16))


def test_all_rows_in_order_may_be_named_as_a_slice():
    layout = layout_of()
    keys, values = (half(cache_of(layout, 2)) for half in (layout.keys, layout.values))
    k, v = torch.rand(2, PAGE + 2, 1, 16)
    places = torch.arange(PAGE + 2)
    PageWrites(slice(PAGE + 2), 1 - places // PAGE, places % PAGE).write(k, v, keys, values)
    for half, given in ((keys, k), (values, v)):
        assert torch.equal(half[[1, 0]].flatten(0, 1)[: PAGE + 2], given)
