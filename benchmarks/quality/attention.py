# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""One method's attention over a batch of sequences of one length, on the product's own kernels."""

from functools import partial

import torch
from needle.network import Attention, full_attention
from packed import empty_tables, packed
from torch import Tensor

from quality.methods import Method
from sparsed_vllm.kernels import api
from sparsed_vllm.steps import Phase, phase_of


class SparseAttention:
    """Gives needle.decoding.denoise the attention of each step.

    tables [num_layers]: as kernels.reference.select_blocks writes them
    """

    def __init__(
        self,
        method: Method,
        *,
        batch: int,
        prompt: int,  # tokens, as below
        canvas: int,
        steps: int,
        block_size: int,
        query_block_size: int | None = None,
        device: torch.device,
    ) -> None:
        self.method, self.steps = method, steps
        # Without a prompt every block is one of the generation: the selection is a plain one.
        front = prompt if method.isolated else 0
        lengths = [prompt + canvas] * batch
        self.layout = packed(lengths, block_size, device, query_block_size)
        self.selection = api.Selection.of(
            self.layout, [front] * batch, [method.select] * batch, [method.mass] * batch
        )
        self.tables: dict[int, api.BlockTables] = {}

    def __call__(self, step: int) -> Attention:
        if self.method.table == "none":
            return full_attention
        if self.method.table == "window":
            return self._windowed
        phase = phase_of(step, self.steps, self.method.skip, self.method.refresh)
        if phase is Phase.DENSE:
            return full_attention
        if phase is Phase.RECORDING:
            return self.recording
        return self.renewing if self.method.table == "renewed" else self.sparse

    @property
    def density(self) -> float:
        """Kept by possible blocks, in the last sparse step."""
        if not self.tables:
            return 1.0
        counts = [self.lists(layer)[1].double().mean() for layer in self.tables]
        return float(torch.stack(counts).mean() / self.layout.max_key_blocks)

    def lists(self, layer: int) -> tuple[Tensor, Tensor]:
        """Kept blocks [blocks, heads, width] of all sequences, their numbers [blocks, heads]."""
        tables = self.tables[layer]
        rows = [tables.rows(sequence) for _, sequence in self.layout.sequences()]
        pages, rows_of_pages = (torch.cat(part) for part in zip(*rows, strict=True))
        return tables.kept[pages, rows_of_pages], tables.num_kept[pages, rows_of_pages]

    def recording(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Record, and attend to everything."""
        self.record(layer, q, k)
        return full_attention(layer, q, k, v)

    def renewing(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Record, and attend to no more than that."""
        self.record(layer, q, k)
        return self.sparse(layer, q, k, v)

    def _windowed(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer not in self.tables:
            self.tables[layer] = self.tables.get(0) or self._windows(q.shape[1])
        return self.sparse(layer, q, k, v)

    def _windows(self, num_heads: int) -> api.BlockTables:
        """Windows as wide as the longest rows that the selection would write."""
        width = self.selection.most_kept
        tables = empty_tables(self.layout, num_heads, width)
        lists = torch.tensor(
            window_lists(self.layout.max_key_blocks, width, self.method.sinks),
            dtype=tables.kept.dtype,
            device=tables.kept.device,
        )
        for _, sequence in self.layout.sequences():
            tables.kept[tables.rows(sequence)] = lists[:, None]
        tables.num_kept.fill_(width)
        return tables

    def record(self, layer: int, q: Tensor, k: Tensor) -> None:
        """Note which key blocks each head keeps."""
        of = (self.layout, self.selection)
        scores = api.block_scores(pack(q), pack(k), None, *of, scale=q.shape[-1] ** -0.5)
        if self.method.shared:
            scores = tuple(x.mean(0, keepdim=True).expand_as(x).contiguous() for x in scores)
        tables = empty_tables(self.layout, q.shape[1], self.selection.most_kept)
        api.select_blocks(*scores, *of, tables)
        self.tables[layer] = tables

    def sparse(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to what was recorded."""
        attend = partial(api.block_sparse_attention, scale=q.shape[-1] ** -0.5)
        out = attend(*(pack(x) for x in (q, k, v)), self.layout, self.tables[layer])
        return out.unflatten(0, (len(q), -1)).transpose(1, 2)


def pack(x: Tensor) -> Tensor:
    """[batch, heads, tokens, head size] -> [batch * tokens, heads, head size]"""
    return x.transpose(1, 2).flatten(0, 1)


def window_lists(num_blocks: int, width: int, sinks: int) -> list[list[int]]:
    """For each query block `width` key blocks: the first `sinks`, and the nearest of the others.

    At either end a window lies to one side, so that all are equally wide.
    """
    sinks = min(sinks, width)
    near, last = width - sinks, num_blocks - (width - sinks)
    firsts = (min(max(i - (near - 1) // 2, sinks), last) for i in range(num_blocks))
    return [[*range(sinks), *range(first, first + near)] for first in firsts]
