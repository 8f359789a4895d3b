# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The keys and values of a batch in pages, for the kernels that read pages."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from kernel_cases import NAN, Batch, layout_like, scattered_tables, write_lists
from torch import Tensor

from sparsed_vllm.kernels.layout import KEY_LEN, NUM_ROWS, PAGE, BatchLayout, BlockTables


@dataclass(frozen=True)
class Pool:
    """whole [num_pages, 2, PAGE, num_kv_heads, head_dim]: keys and values, NaN where no token is

    pages int32 [page rows, most pages]
    """

    whole: Tensor
    pages: Tensor

    @classmethod
    def of(cls, batch: Batch, *, heads_first: bool = False) -> "Pool":
        """In random pages.  heads_first: in a page's memory heads come before tokens"""
        tables = scattered_tables(batch, 1)
        num_heads, head_dim = batch.k.shape[1:]
        shape = [num_heads, PAGE] if heads_first else [PAGE, num_heads]
        whole = torch.full((len(tables.kept), 2, *shape, head_dim), NAN, dtype=batch.k.dtype)
        whole = whole.transpose(2, 3) if heads_first else whole
        for sequence in batch.sequences:
            places = torch.arange(sequence.key_len)
            pages = tables.pages[sequence.page_row, places // PAGE].long()
            for half, tokens in enumerate((batch.k, batch.v)):
                whole[pages, half, places % PAGE] = tokens[sequence.keys]
        return cls(whole, tables.pages)

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        return self.whole[:, 0], self.whole[:, 1]

    def tables(self, batch: Batch, mask: Tensor) -> BlockTables:
        """Lists what bool [num_heads, num_tiles, key blocks] names, in the rows of these pages."""
        most = max(mask.sum(-1).flatten().tolist(), default=0)
        tables = replace(scattered_tables(batch, most + 2), pages=self.pages)
        write_lists(batch, tables, mask)
        return tables

    def to(self, device: str) -> "Pool":
        return Pool(self.whole.to(device), self.pages.to(device))


def attending(
    attend: Any, pool: Pool, seen: Callable[[BatchLayout], BatchLayout] = lambda layout: layout
) -> Callable[..., Any]:
    """`attend` as kernel_cases.run_attention calls it: with k and v, which it reads from pages.

    seen: the layout that it is given
    """

    def call(q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout, *tables: Any, **options: Any):
        own = pool.to(q.device.type)
        where = tables or (own.pages,)
        return attend(q, *own.halves, seen(layout), *where, **options)

    return call


def bounded(layout: BatchLayout) -> BatchLayout:
    """As in a CUDA graph: the host knows bounds alone, and one sequence more that has no rows."""
    host = layout.host[:, [*range(layout.num_seqs), 0]].copy()
    host[[NUM_ROWS, KEY_LEN], -1] = 0
    columns = layout_like(layout, host).columns
    most = host.copy()
    most[NUM_ROWS] = layout.max_num_rows + 2 * layout.tile
    most[KEY_LEN] = layout.max_key_len + 3000
    return replace(layout, host=most, columns=columns)
