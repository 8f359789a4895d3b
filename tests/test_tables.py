# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Rows of block tables in vLLM's pages."""

import pytest
import torch

from sparsed_vllm.kernels.layout import PAGE, BlockTables
from sparsed_vllm.tables import TablePages, room_of_rows, rows_of


def cache_of(tables, num_pages, dtype, gap=0):
    """A layer's cache as vLLM hands it out: in its own type, other layers' pages between."""
    width = tables.bytes_per_token // dtype.itemsize
    whole = torch.zeros(num_pages, 1, PAGE * (1 + gap), width, dtype=dtype)
    return whole[:, :, :PAGE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [torch.int16, torch.int32])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("gap", [0, 2])
def test_every_row_of_every_head_has_numbers_of_its_own(dtype, ids, block_size, gap):
    tables = TablePages(num_heads=3, ids_per_token=2, dtype=ids)
    cache = cache_of(tables, 4, dtype, gap)
    kept, num_kept = tables.of(cache, block_size)
    assert kept.shape == (4, PAGE // block_size, 3, 2 * block_size - 1)
    assert kept.shape[3] == room_of_rows(2, block_size)
    numbers = torch.arange(kept.numel() + num_kept.numel(), dtype=torch.int32)
    kept.copy_(numbers[: kept.numel()].view_as(kept))
    num_kept.copy_(numbers[kept.numel() :].view_as(num_kept))
    written = torch.cat([kept.flatten(), num_kept.flatten()])
    assert torch.equal(written.int(), numbers.to(ids).int())


def test_a_page_s_tables_stay_within_the_page():
    tables = TablePages(num_heads=3, ids_per_token=2, dtype=torch.int16)
    cache = cache_of(tables, 3, torch.float32)
    for block_size in (16, 128):
        kept, num_kept = tables.of(cache, block_size)
        kept[1], num_kept[1] = -1, -1
    assert not cache[[0, 2]].view(torch.int16).any()


def test_a_sequence_s_rows_are_those_of_its_pages():
    tables = TablePages(num_heads=2, ids_per_token=1, dtype=torch.int16)
    kept, num_kept = tables.of(cache_of(tables, 5, torch.int16), 64)
    num_kept[:] = torch.arange(10, dtype=torch.int16).view(5, 2, 1)
    pages = torch.tensor([[0, 0], [3, 1]], dtype=torch.int32)
    _, counts = rows_of(BlockTables(kept, num_kept, pages), 1, num_blocks=3)
    assert counts.tolist() == [[6, 6], [7, 7], [2, 2]]


@pytest.mark.parametrize(("heads", "nbytes"), [(32, 512), (28, 448), (3, 48), (1, 16)])
def test_a_token_s_share_of_a_page_is_whole_numbers_of_any_type(heads, nbytes):
    assert TablePages(heads, 8, torch.int16).bytes_per_token == nbytes
