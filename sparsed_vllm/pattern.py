# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Which key blocks each head of each query block of a request keeps."""

from dataclasses import replace

import torch
from torch import Tensor

from sparsed_vllm.config import BLOCK_SIZES, Sparsity
from sparsed_vllm.kernels.layout import QueryBlocks, Span, Window, id_dtype, num_blocks


class Pattern:
    """One request's table on one rank: written once, by its recording step, then only read.

    It lists nothing until then, so that a layer whose recording failed leaves no ids to follow.

    blocks: the request's query blocks, its first token counting as token 0
    kept int16 or int32 [num_layers, num_blocks, num_heads, width]: ids, ascending, then -1
    num_kept int32 [num_layers, num_blocks, num_heads]: how many ids count
    rows int64 [num_blocks]: the table row of each query block
    """

    def __init__(
        self,
        sparsity: Sparsity,
        *,
        num_prompt_tokens: int,
        num_tokens: int,
        num_layers: int,
        num_heads: int,
        device: torch.device,
    ) -> None:
        self._span = Span(0, num_tokens, num_prompt_tokens, sparsity.select)
        self.blocks = QueryBlocks.of([self._span], sparsity.block_size, device)
        shape = (num_layers, self.blocks.num_blocks, num_heads)
        dtype = id_dtype(self.blocks.max_key_blocks)
        self.kept = torch.empty(*shape, self.blocks.most_kept, dtype=dtype, device=device)
        self.num_kept = torch.zeros(shape, dtype=torch.int32, device=device)
        self.rows = torch.arange(self.blocks.num_blocks, device=device)
        self._window: tuple[slice, QueryBlocks, Tensor] | None = None  # the latest

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """kept [num_blocks, num_heads, width], num_kept [num_blocks, num_heads] and rows."""
        return self.kept[layer], self.num_kept[layer], self.rows

    def within(self, window: slice) -> tuple[QueryBlocks, Tensor]:
        """The query blocks of the tokens in `window`, which q alone holds, and their table rows.

        Kept until another is asked for: many steps in a row share a window.
        """
        if window == slice(0, self._span.length):
            return self.blocks, self.rows
        if self._window is None or self._window[0] != window:
            span = replace(self._span, window=Window(0, window.start, window.stop))
            size, device = self.blocks.block_size, self.rows.device
            blocks = QueryBlocks.of([span], size, device)
            first = window.start // size
            rows = torch.arange(first, first + blocks.num_blocks, device=device)
            self._window = window, blocks, rows
        return self._window[1:]

    @property
    def num_possible(self) -> int:
        """How many ids the table would list if every row kept every key block."""
        return self.num_kept.numel() * self.blocks.max_key_blocks

    @property
    def num_bytes(self) -> int:
        """Device memory of the ids and their counts."""
        return self.kept.nbytes + self.num_kept.nbytes


def num_bytes_at_most(num_tokens: int, longest: int, table_ids: int) -> int:
    """What tables of `num_tokens` tokens can take for each layer and head: ids and counts.

    longest: tokens of the longest request;  table_ids: as in SparseConfig
    """
    size = min(BLOCK_SIZES)  # the most rows, each with its count
    id_bytes = id_dtype(num_blocks(longest, size)).itemsize
    row_bytes = table_ids * size * id_bytes + torch.int32.itemsize
    return num_blocks(num_tokens, size) * row_bytes
