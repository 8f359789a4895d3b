# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""One method's attention over a batch of sequences of one length, on the product's own kernels."""

from functools import partial

import torch
from needle.network import Attention, full_attention
from torch import Tensor

from quality.methods import Method
from sparsed_vllm.kernels import api
from sparsed_vllm.phases import Phase, phase_of


class SparseAttention:
    """Gives needle.decoding.denoise the attention of each step.

    table [num_layers] kept [num_blocks, num_heads, width] and num_kept [num_blocks, num_heads],
    as kernels.reference.select_blocks writes them
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
        device: torch.device,
    ) -> None:
        self.method, self.steps = method, steps
        length = prompt + canvas
        # Without a prompt every block is one of the generation: the selection is a plain one.
        front = prompt if method.isolated else 0
        self.blocks = api.QueryBlocks.of(
            [api.Span(i * length, length, front, method.select) for i in range(batch)],
            block_size,
            device,
        )
        self.rows = torch.arange(self.blocks.num_blocks, device=device)
        self.table: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, step: int) -> Attention:
        if self.method.table == "none":
            return full_attention
        if self.method.table == "window":
            return self._windowed
        phase = phase_of(step, self.steps, self.method.skip)
        if phase is Phase.DENSE:
            return full_attention
        if phase is Phase.RECORDING:
            return self.recording
        return self.renewing if self.method.table == "renewed" else self.sparse

    @property
    def density(self) -> float:
        """Kept by possible blocks, in a sparse step."""
        if not self.table:
            return 1.0
        kept = torch.stack([num_kept.float().mean() for _, num_kept in self.table.values()])
        return float(kept.mean() / self.blocks.max_key_blocks)

    def recording(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Record, and attend to everything."""
        self.record(layer, q, k)
        return full_attention(layer, q, k, v)

    def renewing(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Record, and attend to no more than that."""
        self.record(layer, q, k)
        return self.sparse(layer, q, k, v)

    def _windowed(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer not in self.table:
            self.table[layer] = self.table.get(0) or window_table(
                self.blocks, q.shape[1], self.method.sinks
            )
        return self.sparse(layer, q, k, v)

    def record(self, layer: int, q: Tensor, k: Tensor) -> None:
        """Note which key blocks each head keeps."""
        packed = [pack(x) for x in (q, k)]
        scores = api.block_scores(*packed, None, self.blocks, scale=q.shape[-1] ** -0.5)
        if self.method.shared:
            scores = tuple(x.mean(0, keepdim=True).expand_as(x).contiguous() for x in scores)
        kept, num_kept = empty_table(self.blocks, q.shape[1])
        api.select_blocks(*scores, self.blocks, kept, num_kept, self.rows)
        self.table[layer] = kept, num_kept

    def sparse(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to what was recorded."""
        attend = partial(api.block_sparse_attention, scale=q.shape[-1] ** -0.5)
        out = attend(*(pack(x) for x in (q, k, v)), self.blocks, *self.table[layer], self.rows)
        return out.unflatten(0, (len(q), -1)).transpose(1, 2)


def pack(x: Tensor) -> Tensor:
    """[batch, heads, tokens, head size] -> [batch * tokens, heads, head size]"""
    return x.transpose(1, 2).flatten(0, 1)


def empty_table(blocks: api.QueryBlocks, num_heads: int) -> tuple[Tensor, Tensor]:
    """Room for kept and num_kept."""
    shape = (blocks.num_blocks, num_heads)
    ids = api.id_dtype(blocks.max_key_blocks)
    kept = torch.empty(*shape, blocks.most_kept, dtype=ids, device=blocks.starts.device)
    return kept, torch.empty(shape, dtype=torch.int32, device=blocks.starts.device)


def window_table(blocks: api.QueryBlocks, num_heads: int, sinks: int) -> tuple[Tensor, Tensor]:
    """Kept blocks of a window as wide as the longest rows that the selection would write."""
    kept, num_kept = empty_table(blocks, num_heads)
    width = blocks.most_kept
    lists = window_lists(blocks.max_key_blocks, width, sinks) * len(blocks.spans)
    kept[:] = torch.tensor(lists, dtype=kept.dtype, device=kept.device)[:, None]
    return kept, num_kept.fill_(width)


def window_lists(num_blocks: int, width: int, sinks: int) -> list[list[int]]:
    """For each query block `width` key blocks: the first `sinks`, and the nearest of the others.

    At either end a window lies to one side, so that all are equally wide.
    """
    sinks = min(sinks, width)
    near, last = width - sinks, num_blocks - (width - sinks)
    firsts = (min(max(i - (near - 1) // 2, sinks), last) for i in range(num_blocks))
    return [[*range(sinks), *range(first, first + near)] for first in firsts]
