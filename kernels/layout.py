# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Where the blocks of a packed batch lie, and how many key blocks each of them keeps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Whole query blocks of a sequence, where q holds no others: its tokens [start, end)."""

    row: int  # of q, where token `start` lies
    start: int  # a multiple of the block size
    end: int  # another one, or the sequence's end


@dataclass(frozen=True)
class Span:
    """One sequence of a packed batch: tokens [first, first + length), the prompt in front."""

    first: int
    length: int
    prompt_length: int
    select: float = 1.0  # share of key blocks to keep, in (0, 1]; read by the selection only
    window: Window | None = None  # None: q holds the whole sequence where k and v do

    @property
    def query_start(self) -> int:
        """The row of q where the first token lies or, before a window, would: maybe below 0."""
        return self.first if self.window is None else self.window.row - self.window.start

    @property
    def query_rows(self) -> slice:
        """The rows of q that hold the sequence's queries."""
        if self.window is None:
            return slice(self.first, self.first + self.length)
        return slice(self.window.row, self.window.row + self.window.end - self.window.start)

    def query_blocks(self, block_size: int) -> range:
        """The places in the sequence, in blocks, of the query blocks that q holds."""
        if self.window is None:
            return range(num_blocks(self.length, block_size))
        assert self.window.start % block_size == 0, "a window begins with a block"
        return range(self.window.start // block_size, num_blocks(self.window.end, block_size))


@dataclass(frozen=True)
class QueryBlocks:
    """The query blocks of a packed batch of one block size, sequence after sequence.

    The tensors are int32 [num_blocks], one number for each query block.
    """

    block_size: int  # tokens
    spans: tuple[Span, ...]  # on the host
    max_key_blocks: int  # of the longest sequence
    starts: Tensor  # first token of the block's sequence in the packed batch
    lengths: Tensor  # tokens of the block's sequence
    indices: Tensor  # the block's place in its sequence, in blocks
    first_gens: Tensor  # first generation block of the sequence
    keep_all: Tensor  # blocks that the selection among all blocks takes
    keep_gen: Tensor  # blocks that the selection among generation blocks takes
    query_starts: Tensor  # Span.query_start of the block's sequence

    @classmethod
    def of(
        cls, spans: Sequence[Span], block_size: int, device: torch.device | str
    ) -> "QueryBlocks":
        """The blocks of `spans`, sent to `device` in one copy."""
        columns = [column for span in spans for column in _columns(span, block_size)]
        # Each column begins at a multiple of 16 bytes: kernels are compiled anew where one does
        # not.
        padding = [(0,) * 7] * (-len(columns) % 4)
        table = torch.tensor(columns + padding, dtype=torch.int32).reshape(-1, 7).T.contiguous()
        most = max((num_blocks(span.length, block_size) for span in spans), default=0)
        sent = table.to(device, non_blocking=True)[:, : len(columns)]
        return cls(block_size, tuple(spans), most, *sent)

    @property
    def num_blocks(self) -> int:
        return self.indices.shape[0]

    @property
    def has_windows(self) -> bool:
        """Whether q lacks query blocks of a sequence."""
        return any(span.window is not None for span in self.spans)

    @property
    def most_kept(self) -> int:
        """The most key blocks that a row of this batch keeps."""
        return max((self._most_kept(span) for span in self.spans), default=0)

    def _most_kept(self, span: Span) -> int:
        count = num_blocks(span.length, self.block_size)
        return _row_bound(count, first_gen_block(span, self.block_size), span.select)

    def by_span(self) -> Iterator[tuple[Span, slice]]:
        """Each sequence with the places of its query blocks among all of them."""
        first = 0
        for span in self.spans:
            after = first + len(span.query_blocks(self.block_size))
            yield span, slice(first, after)
            first = after


def num_blocks(length: int, block_size: int) -> int:
    return -(-length // block_size)


def first_gen_block(span: Span, block_size: int) -> int:
    """The first block that begins at or after the prompt's end, at the latest the last block."""
    last = num_blocks(span.length, block_size) - 1
    return min(num_blocks(span.prompt_length, block_size), last)


def keep_counts(num_blocks: int, first_gen: int, select: float) -> tuple[int, int]:
    """How many blocks the selections among all and among the generation blocks take.

    int() truncates the float product, as the authors have it; they ask for one block more than
    there are where `select` is 1.
    """
    num_gen = num_blocks - first_gen
    keep_all = min(int(num_blocks * select) + 1, num_blocks)
    return keep_all, min(int(num_gen * select) + 1, num_gen)


def _row_bound(num_blocks: int, first_gen: int, select: float) -> int:
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
    return max((_row_bound(num_blocks, first, select) for first in range(num_blocks)), default=0)


def id_dtype(max_key_blocks: int) -> torch.dtype:
    """The smallest type that block ids fit: torch works on uint16 in few places only."""
    return torch.int16 if max_key_blocks <= torch.iinfo(torch.int16).max else torch.int32


def _columns(span: Span, block_size: int) -> Iterator[tuple[int, ...]]:
    """For each query block of `span` what QueryBlocks holds of it, in the order of its fields."""
    count = num_blocks(span.length, block_size)
    first_gen = first_gen_block(span, block_size)
    counts = keep_counts(count, first_gen, span.select)
    for index in span.query_blocks(block_size):
        yield span.first, span.length, index, first_gen, *counts, span.query_start
