# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Whole sequences laid end to end, each with pages of its own for block tables."""

from collections.abc import Sequence

import torch

from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.layout import KEY_LEN


def packed(
    lengths: Sequence[int],
    block_size: int,
    device: torch.device | str,
    query_block_size: int | None = None,
) -> api.BatchLayout:
    """The layout of sequences of so many tokens, in q as in k and v.

    block_size: of keys, and of queries too unless these have a size of their own
    """
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    return api.BatchLayout.of(
        query_block_size or block_size,
        device,
        key_block=block_size,
        query_starts=starts,
        num_rows=lengths,
        first_rows=[0] * len(lengths),
        key_starts=starts,
        key_lens=lengths,
        page_rows=list(range(len(lengths))),
    )


def empty_tables(layout: api.BatchLayout, num_heads: int, width: int) -> api.BlockTables:
    """Room for lists of up to `width` blocks: a packed layout's pages, one after another."""
    device = layout.columns.device
    counts = [api.num_blocks(length, api.PAGE) for length in layout.host[KEY_LEN].tolist()]
    pages = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for row, own in enumerate(torch.arange(sum(counts)).split(counts)):
        pages[row, : len(own)] = own
    shape = (sum(counts), api.PAGE // layout.tile, num_heads)
    ids = api.id_dtype(layout.max_key_blocks)
    kept = torch.empty(*shape, width, dtype=ids, device=device)
    return api.BlockTables(kept, torch.empty(shape, dtype=ids, device=device), pages.to(device))
