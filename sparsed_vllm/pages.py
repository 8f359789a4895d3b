# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What a layer's pages hold: keys and values, where requests may reuse them, and block tables."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.layout import PAGE, BlockTables
from sparsed_vllm.tables import TablePages


@dataclass(frozen=True)
class PageLayout:
    """Keys of all tokens of a page, then values, then tables.

    holds_kv: whether pages have room for keys and values
    num_kv_heads: of this rank;  dtype: of keys and values
    """

    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    holds_kv: bool
    tables: TablePages

    @property
    def kv_bytes_per_token(self) -> int:
        if not self.holds_kv:
            return 0
        return 2 * self.num_kv_heads * self.head_size * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        return self.kv_bytes_per_token + self.tables.bytes_per_token

    def keys(self, cache: Tensor) -> Tensor:
        """[num_pages, PAGE, num_kv_heads, head_size]; cache: as vLLM allocates it"""
        return self._half(cache, 0)

    def values(self, cache: Tensor) -> Tensor:
        """The same of values."""
        return self._half(cache, 1)

    def halves(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.keys(cache), self.values(cache)

    def _half(self, cache: Tensor, half: int) -> Tensor:
        assert self.holds_kv and cache.dtype == self.dtype
        token = self.num_kv_heads * self.head_size
        shape = (cache.shape[0], PAGE, self.num_kv_heads, self.head_size)
        strides = (cache.stride(0), token, self.head_size, 1)
        return cache.as_strided(shape, strides, cache.storage_offset() + half * PAGE * token)

    def block_tables(self, cache: Tensor, pages: Tensor, query_block_size: int) -> BlockTables:
        """The tables of sequences with these pages; pages int32 [num_seqs, most pages]"""
        kept = self.tables.of(cache, query_block_size, PAGE * self.kv_bytes_per_token)
        return BlockTables(*kept, pages)

    def empty(self, num_pages: int, device: torch.device) -> Tensor:
        """A layer's cache, for tests and for the rehearsal of the kernels."""
        shape = (num_pages, 1, PAGE, self.bytes_per_token // self.dtype.itemsize)
        return torch.zeros(shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class PageWrites:
    """Where the keys and values of a step's rows go.

    rows: of the batch, int64 [n], or its first n
    pages, offsets int64 [n]: their places; a row whose page is negative is not kept
    """

    rows: slice | Tensor
    pages: Tensor
    offsets: Tensor

    def write(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
        """k, v [rows of the batch, num_kv_heads, head_size];  keys, values: a layer's pages"""
        rows = self.rows if isinstance(self.rows, Tensor) else None
        api.write_pages(k, v, keys, values, self.pages, self.offsets, rows)
