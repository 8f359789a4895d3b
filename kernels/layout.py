# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Where the sequences of a launch lie, where their block tables lie, and how many blocks they keep.

The host arrays are int32 numpy, so that describing a batch of 64 sequences costs microseconds; the
kernels read the same columns on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

PAGE = 128
"""Tokens of a page: a multiple of every sparse block size, and what `--block-size` must be."""

LEAST_KEYS = 512
"""Of a part of a sequence's keys where these are split: with fewer, merging takes longer than it
saves.
"""

QUERY_START, NUM_ROWS, FIRST_ROW, KEY_START, KEY_LEN, PAGE_ROW, TILE_START = range(7)
"""The columns of a layout, one number a sequence:

QUERY_START: row of q at which the rows that it computes begin
NUM_ROWS: how many rows it computes
FIRST_ROW: the place in the sequence of the first of them; a multiple of the tile
KEY_START: row of k and v at which its keys begin
KEY_LEN: its tokens, all of which are keys; 0: nothing of it is computed in this launch
PAGE_ROW: its row in the page table
TILE_START: its first tile among the tiles of all; it has none where NUM_ROWS or KEY_LEN is 0
"""
NUM_COLUMNS = 7


class Placement(NamedTuple):
    """One sequence of a layout: a number of each column, in their order."""

    query_start: int
    num_rows: int
    first_row: int
    key_start: int
    key_len: int
    page_row: int
    tile_start: int

    @property
    def queries(self) -> slice:
        """Its rows of q."""
        return slice(self.query_start, self.query_start + self.num_rows)

    @property
    def keys(self) -> slice:
        """Its rows of k and v."""
        return slice(self.key_start, self.key_start + self.key_len)

    def tiles(self, tile: int) -> Iterator[tuple[int, slice]]:
        """Its tiles' numbers among all of the layout, each with its rows of q."""
        end = self.queries.stop
        for number, start in enumerate(range(self.query_start, end, tile), self.tile_start):
            yield number, slice(start, min(start + tile, end))


@dataclass(frozen=True)
class BatchLayout:
    """Sequences that one launch computes, cut into tiles of query rows.

    Tile t belongs to the last sequence whose TILE_START is at most t. A tile never crosses from one
    sequence to the next; a sequence's last tile may be partial.

    tile: query rows of a tile; where block tables are read or written, of a query block
    host int32 [NUM_COLUMNS, num_seqs];  columns: the same on the device
    key_block: tokens of a key block, where block tables are read or written; divides the tile, and
        None is all of it
    The kernels that read pages take their grids from `host` and all else from `columns`: in a CUDA
    graph `host` holds bounds, and `columns` is where the numbers of each replay are written.
    """

    tile: int
    host: NDArray[np.int32]
    columns: Tensor
    key_block: int | None = None

    @classmethod
    def of(
        cls,
        tile: int,
        device: torch.device | str,
        *,
        key_block: int | None = None,
        **columns: ArrayLike,
    ) -> BatchLayout:
        """One layout, sent in one copy; `columns` as host_layout takes them."""
        return send_layouts([(tile, key_block, host_layout(tile, **columns))], device)[0]

    def only(self, seq: int) -> BatchLayout:
        """The layout of one of the sequences."""
        host = self.host[:, seq : seq + 1].copy()
        host[TILE_START] = 0
        return replace(self, host=host, columns=send(host, self.columns.device))

    @property
    def block_size(self) -> int:
        """Tokens of a key block."""
        return self.tile if self.key_block is None else self.key_block

    @property
    def num_seqs(self) -> int:
        return self.host.shape[1]

    @cached_property
    def num_tiles(self) -> int:
        return int(_tiles(self.host, self.tile).sum())

    @cached_property
    def max_num_rows(self) -> int:
        return int(self.host[NUM_ROWS].max(initial=0))

    @cached_property
    def max_key_len(self) -> int:
        return int(self.host[KEY_LEN].max(initial=0))

    @cached_property
    def num_query_rows(self) -> int:
        """The fewest rows that q may have."""
        return int((self.host[QUERY_START] + self.host[NUM_ROWS]).max(initial=0))

    @cached_property
    def num_key_rows(self) -> int:
        """The fewest rows that k and v may have."""
        return int((self.host[KEY_START] + self.host[KEY_LEN]).max(initial=0))

    @cached_property
    def num_page_rows(self) -> int:
        """The fewest rows that the page table may have."""
        return int(self.host[PAGE_ROW].max(initial=-1)) + 1

    @cached_property
    def is_whole(self) -> bool:
        """Whether every row is computed of each sequence that has keys, as a recording needs."""
        starts, rows, keys = self.host[FIRST_ROW], self.host[NUM_ROWS], self.host[KEY_LEN]
        whole = (starts == 0) & (rows == keys)
        return bool((whole | (keys == 0)).all())

    @property
    def max_key_blocks(self) -> int:
        """Key blocks of the longest sequence."""
        return num_blocks(self.max_key_len, self.block_size)

    def sequences(self) -> Iterator[tuple[int, Placement]]:
        """The sequences that have tiles, each after its place in the layout."""
        for place, column in enumerate(self.host.T.tolist()):
            sequence = Placement(*column)
            if sequence.num_rows and sequence.key_len:
                yield place, sequence


def send(values: NDArray[Any], device: torch.device | str) -> Tensor:
    """A copy on the device; through pinned memory, as from any other the host would wait for it."""
    return _pinned(values, device).to(device, non_blocking=True)


def send_into(kept: Tensor, values: NDArray[Any]) -> None:
    """The same, over what a tensor held."""
    kept.copy_(_pinned(values, kept.device), non_blocking=True)


def _pinned(values: NDArray[Any], device: torch.device | str) -> Tensor:
    """On the host, where the device may fetch it."""
    host = torch.from_numpy(values)
    return host.pin_memory() if torch.device(device).type == "cuda" else host


def places_within(counts: NDArray[Any]) -> NDArray[Any]:
    """0, 1, ... up to each count in turn; int [sum(counts)]"""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def host_layout(
    tile: int,
    *,
    query_starts: ArrayLike,
    num_rows: ArrayLike,
    first_rows: ArrayLike | None = None,
    key_starts: ArrayLike | None = None,
    key_lens: ArrayLike,
    page_rows: ArrayLike,
) -> NDArray[np.int32]:
    """The columns of a layout, int32 [NUM_COLUMNS, num_seqs]; see the names of the columns.

    first_rows, key_starts: None: 0, where rows are of any tokens and keys are in pages
    """
    zeros = np.zeros_like(query_starts)
    first_rows = zeros if first_rows is None else first_rows
    key_starts = zeros if key_starts is None else key_starts
    given = (query_starts, num_rows, first_rows, key_starts, key_lens, page_rows)
    host = np.stack([np.asarray(column, np.int32) for column in (*given, given[0])])
    assert not (host[FIRST_ROW] % tile).any(), "a tile begins with a block"
    tiles = _tiles(host, tile)
    host[TILE_START] = np.cumsum(tiles) - tiles
    return host


def send_layouts(
    hosts: Sequence[tuple[int, int | None, NDArray[np.int32]]], device: torch.device | str
) -> list[BatchLayout]:
    """Layouts of (tile, key_block, host_layout(...)) on the device, all in one copy."""
    if not hosts:
        return []
    parts = send(np.concatenate([host.ravel() for _, _, host in hosts]), device).split(
        [host.size for _, _, host in hosts]
    )
    return [
        BatchLayout(tile, host, part.view(NUM_COLUMNS, -1), key_block)
        for (tile, key_block, host), part in zip(hosts, parts, strict=True)
    ]


def _tiles(host: NDArray[np.int32], tile: int) -> NDArray[np.int32]:
    """How many tiles each sequence has."""
    return np.where(host[KEY_LEN] > 0, -(-host[NUM_ROWS] // tile), 0)


@dataclass(frozen=True)
class BlockTables:
    """Which key blocks each head of each query block keeps, in rows that belong to pages.

    The page that holds a query block's keys owns its row, so that whatever allocates and frees
    pages does both. Query block b of a sequence has the row
    [pages[PAGE_ROW, b * tile // PAGE], b % (PAGE // tile)].

    kept int16 or int32 [num_pages, PAGE // tile, num_heads, width]: ids of the sequence's key
        blocks, ascending; what stands behind the first num_kept of a row is undefined
    num_kept of the same type [num_pages, PAGE // tile, num_heads]
    pages int32 [rows, most pages]: vLLM's page table
    """

    kept: Tensor
    num_kept: Tensor
    pages: Tensor

    @property
    def query_block_size(self) -> int:
        return PAGE // self.kept.shape[1]

    def rows(self, sequence: Placement) -> tuple[Tensor, Tensor]:
        """The pages, and the rows in them, of a sequence's query blocks; int64 [blocks] each."""
        first = sequence.first_row // self.query_block_size
        count = num_blocks(sequence.num_rows, self.query_block_size)
        blocks = torch.arange(first, first + count, device=self.pages.device)
        pages = self.pages[sequence.page_row, blocks * self.query_block_size // PAGE]
        return pages.long(), blocks % self.kept.shape[1]


class LightTensors(NamedTuple):
    """What the rows of a captured step read of the batch that runs it, at fixed addresses.

    pages, offsets int64 [rows]: where each row's key and value go
    read_rows int64 [rows]: rows of the batch whose attention is noted
    weights float32 [rows]: how much that of each counts
    """

    pages: Tensor
    offsets: Tensor
    read_rows: Tensor
    weights: Tensor

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> LightTensors:
        """Of rows of no sequence."""
        pages, offsets, read_rows = torch.zeros(3, num_rows, dtype=torch.int64, device=device)
        return cls(pages, offsets, read_rows, torch.zeros(num_rows, device=device))


FIRST_GEN, KEEP_ALL, KEEP_GEN = range(3)
"""The rows of a selection, one number a sequence:

FIRST_GEN: first generation block
KEEP_ALL: blocks that the selection among all blocks takes
KEEP_GEN: blocks that the selection among generation blocks takes
"""


@dataclass(frozen=True)
class Selection:
    """How many blocks the sequences of a recording layout keep.

    host int32 [3, num_seqs];  counts: the same on the device
    mass float64 [num_seqs], on the device: of these blocks a row keeps those that hold such a share
        of its softmax mass; infinity: it keeps them all; None: so do all sequences
    """

    host: NDArray[np.int32]
    counts: Tensor
    mass: Tensor | None = None

    @cached_property
    def most_kept(self) -> int:
        """The most blocks of a row: both selections, the first without its generation blocks."""
        host = self.host
        rows = np.minimum(host[KEEP_ALL], host[FIRST_GEN]) + host[KEEP_GEN]
        return int(rows.max(initial=0))

    @classmethod
    def of(
        cls,
        layout: BatchLayout,
        prompt_lens: Sequence[int],
        selects: Sequence[float],
        masses: Sequence[float | None] = (),
    ) -> Selection:
        """prompt_lens: tokens before the canvas;  selects: shares of blocks to keep, in (0, 1]

        masses: shares of softmax mass that are enough, in (0, 1); None: a sequence keeps all of
            its number; (): all sequences do
        """
        rows = []
        for length, prompt_len, select in zip(
            layout.host[KEY_LEN].tolist(), prompt_lens, selects, strict=True
        ):
            first_gen = first_gen_block(length, prompt_len, layout.block_size)
            blocks = num_blocks(length, layout.block_size)
            rows.append((first_gen, *keep_counts(blocks, first_gen, select)))
        host = np.array(rows, np.int32).reshape(-1, 3).T.copy()
        counts, mass = send(host, layout.columns.device), None
        if any(share is not None for share in masses):
            shares = [np.inf if share is None else share for share in masses]
            mass = send(np.array(shares, np.float64), layout.columns.device)
        return cls(host, counts, mass)

    def only(self, seq: int) -> Selection:
        """The selection of one of the sequences."""
        one = slice(seq, seq + 1)
        mass = None if self.mass is None else self.mass[one].clone()
        return Selection(self.host[:, one].copy(), self.counts[:, one].clone(), mass)


def num_blocks(length: int, block_size: int) -> int:
    return -(-length // block_size)


def first_gen_block(length: int, prompt_len: int, block_size: int) -> int:
    """The first block that begins at or after the prompt's end, at the latest the last block."""
    return min(num_blocks(prompt_len, block_size), num_blocks(length, block_size) - 1)


def keep_counts(num_blocks: int, first_gen: int, select: float) -> tuple[int, int]:
    """How many blocks the selections among all and among the generation blocks take.

    int() truncates the float product, as the authors have it; they ask for one block more than
    there are where `select` is 1.
    """
    num_gen = num_blocks - first_gen
    keep_all = min(int(num_blocks * select) + 1, num_blocks)
    return keep_all, min(int(num_gen * select) + 1, num_gen)


def row_bound(num_blocks: int, first_gen: int, select: float) -> int:
    """The most blocks of a row: both selections, the first without its generation blocks."""
    keep_all, keep_gen = keep_counts(num_blocks, first_gen, select)
    return min(keep_all, first_gen) + keep_gen


# Bounded, as clients choose `select`: any number of values.
@lru_cache(maxsize=1024)
def most_kept(num_blocks: int, select: float) -> int:
    """The most blocks that a row of any sequence of up to `num_blocks` keeps: a table's width.

    The worst prompt is about as long as what the first selection takes: one may keep far more
    than num_blocks * select.
    """
    return max((row_bound(num_blocks, first, select) for first in range(num_blocks)), default=0)


def id_dtype(max_key_blocks: int) -> torch.dtype:
    """The smallest type that block ids fit: torch works on uint16 in few places only."""
    return torch.int16 if max_key_blocks <= torch.iinfo(torch.int16).max else torch.int32
