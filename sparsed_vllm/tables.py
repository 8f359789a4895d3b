# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Block tables in vLLM's pages: the page that holds a query block's keys owns its row of ids.

So vLLM's block manager allocates a request's table with its pages, frees both together, and memory
profiling counts both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsed_vllm.kernels.layout import PAGE, BlockTables

_ALIGNMENT = 16  # bytes


def room_of_rows(ids_per_token: int, query_block_size: int) -> int:
    """The most ids that a row of query blocks of this size has room for; one entry is its count."""
    return ids_per_token * query_block_size - 1


@dataclass(frozen=True)
class TablePages:
    """How a layer's pages hold rows of tables: for each head a count, then the ids.

    num_heads: query heads of this rank
    ids_per_token: entries of a head's row for each token of its query block, the count among them
    dtype: of ids and counts
    """

    num_heads: int
    ids_per_token: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """What a token's share of a page takes."""
        size = self.num_heads * self.ids_per_token * self.dtype.itemsize
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def of(self, cache: Tensor, query_block_size: int, offset: int = 0) -> tuple[Tensor, Tensor]:
        """BlockTables.kept and BlockTables.num_kept in a layer's cache, for query blocks so large.

        cache [num_pages, 1, PAGE, numbers a token], as vLLM allocates it, in any type
        offset: bytes of a page before its tables
        """
        ids = cache.view(self.dtype)
        assert ids.shape[1:3] == (1, PAGE) and ids.stride()[2:] == (ids.shape[3], 1)
        room = room_of_rows(self.ids_per_token, query_block_size)
        shape = (ids.shape[0], PAGE // query_block_size, self.num_heads)
        row = query_block_size * self.bytes_per_token // self.dtype.itemsize
        strides = (ids.stride(0), row, room + 1)
        start = ids.storage_offset() + offset // self.dtype.itemsize
        kept = ids.as_strided((*shape, room), (*strides, 1), start + 1)
        return kept, ids.as_strided(shape, strides, start)


def rows_of(tables: BlockTables, page_row: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """A sequence's own part of tables: kept [num_blocks, num_heads, width] and num_kept."""
    per_page = tables.kept.shape[1]
    blocks = torch.arange(num_blocks, device=tables.kept.device)
    pages = tables.pages[page_row, blocks // per_page].long()
    return tables.kept[pages, blocks % per_page], tables.num_kept[pages, blocks % per_page]
