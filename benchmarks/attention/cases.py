# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What is attended to: queries, keys, values and lists of key blocks."""

from dataclasses import dataclass
from functools import cached_property

import torch
from packed import empty_tables, packed
from torch import Tensor

from sparsed_vllm.kernels import api

SHAPES = {"llada": (32, 32, 128), "dream": (28, 4, 128), "head64": (32, 32, 64)}
"""Heads, key heads and head size."""

LISTS = ("random", "recorded")
BLOCK = 128  # tokens of a query block, and of a key block unless a case has smaller ones
CANVAS = 256  # tokens being generated, at the end
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """density: the share of blocks asked for;  length: tokens, whole blocks

    block_size: tokens of a key block
    """

    shape: str
    length: int
    density: float
    lists: str
    block_size: int = BLOCK

    @property
    def scale(self) -> float:
        return float(SHAPES[self.shape][2] ** -0.5)

    @property
    def num_heads(self) -> int:
        return SHAPES[self.shape][0]

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return SHAPES[self.shape][0] // SHAPES[self.shape][1]

    @property
    def num_blocks(self) -> int:
        return self.length // BLOCK

    @property
    def num_key_blocks(self) -> int:
        return self.length // self.block_size

    @cached_property
    def qkv(self) -> tuple[Tensor, ...]:
        """[length, heads, head_dim] each, slices of one tensor as a fused projection has them."""
        heads, kv_heads, dim = SHAPES[self.shape]
        fused = torch.randn(
            self.length, heads + 2 * kv_heads, dim, dtype=torch.bfloat16, device=DEVICE
        )
        if self.lists == "recorded":
            fused[:, : heads + kv_heads] = rotated(fused[:, : heads + kv_heads])
        return fused.split([heads, kv_heads, kv_heads], dim=1)

    @cached_property
    def heads_first(self) -> list[Tensor]:
        """q, k, v [1, heads, length, head_dim], dense"""
        return [x.transpose(0, 1)[None].contiguous() for x in self.qkv]

    @cached_property
    def layout(self) -> api.BatchLayout:
        return packed([self.length], self.block_size, DEVICE, BLOCK)

    @cached_property
    def selection(self) -> api.Selection:
        return api.Selection.of(self.layout, [self.length - CANVAS], [self.density])

    @cached_property
    def tables(self) -> api.BlockTables:
        return self.recorded() if self.lists == "recorded" else self.random()

    def random(self) -> api.BlockTables:
        """Equally many blocks for each, ascending."""
        keep = max(1, round(self.num_key_blocks * self.density))
        shape = (self.num_blocks, 1, self.num_heads, self.num_key_blocks)
        picks = torch.rand(shape, device=DEVICE).topk(keep, dim=-1).indices
        tables = empty_tables(self.layout, self.num_heads, keep)
        tables.kept.copy_(picks.sort(-1).values)
        tables.num_kept.fill_(keep)
        return tables

    def recorded(self) -> api.BlockTables:
        """What a recording step keeps."""
        of = (self.layout, self.selection)
        tables = empty_tables(self.layout, self.num_heads, self.selection.most_kept)
        scores = api.block_scores(*self.qkv[:2], None, *of, scale=self.scale)
        api.select_blocks(*scores, *of, tables)
        return tables

    @cached_property
    def ids(self) -> Tensor:
        """The lists as others take them: int32 [heads, blocks, width], 0 behind a list's end."""
        kept, counts = self.tables.kept[:, 0].transpose(0, 1).int(), self.counts[..., None]
        listed = torch.arange(kept.shape[-1], device=DEVICE) < counts
        return kept.where(listed, 0).contiguous()

    @cached_property
    def counts(self) -> Tensor:
        """Lengths of the lists, int32 [heads, blocks]"""
        return self.tables.num_kept[:, 0].T.int().contiguous()

    @cached_property
    def mask(self) -> Tensor:
        """The lists as bool [heads, blocks, key blocks]"""
        shape = (*self.counts.shape, self.num_key_blocks + 1)
        mask = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
        listed = torch.arange(self.ids.shape[-1], device=DEVICE) < self.counts[..., None]
        mask.scatter_(2, self.ids.long().where(listed, self.num_key_blocks), True)
        return mask[..., : self.num_key_blocks].contiguous()

    @cached_property
    def share(self) -> float:
        """Of the blocks, those that the lists name."""
        return float(self.tables.num_kept.double().mean()) / self.num_key_blocks


def rotated(x: Tensor) -> Tensor:
    """With a direction of its own for each head, and rotary positions: near keys weigh more."""
    length, _, dim = x.shape
    x = (x + 2 * torch.randn_like(x[:1])).float()
    angles = torch.outer(
        torch.arange(length, device=x.device),
        500000.0 ** -torch.linspace(0, 1, dim // 2, device=x.device),
    )[:, None]
    a, b = x.chunk(2, dim=-1)
    turned = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
    return torch.cat(turned, -1).to(torch.bfloat16)
