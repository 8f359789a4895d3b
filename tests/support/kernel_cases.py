# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Batches for the kernel tests, what float64 makes of them, and how far off is too far.

Sequences lie in any order in q, in another one in k and v, and between them rows of NaN, as a
neighbour in a step may have: what a kernel reads or writes past a sequence's end shows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsed_vllm.kernels import reference
from sparsed_vllm.kernels.layout import (
    KEY_LEN,
    PAGE,
    PAGE_ROW,
    BatchLayout,
    BlockTables,
    Placement,
    Selection,
    num_blocks,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the Triton kernels run: compiled on a GPU, else in the interpreter."""

RAGGED = [(1, 0), (15, 3), (16, 16), (17, 16), (63, 20), (65, 64)]
"""(length, prompt length) of sequences around the block boundaries."""

LONGER = [(127, 100), (1, 1), (129, 100), (128, 0), (300, 250)]

BLOCK_SIZES, HEAD_DIMS = (16, 32, 64, 128), (32, 64, 96, 128, 256)

COMPILED = [
    *(
        (size, dim, (torch.float16, torch.bfloat16)[(i + j) % 2])
        for i, size in enumerate(BLOCK_SIZES)
        for j, dim in enumerate(HEAD_DIMS)
    ),
    *zip((16, 32, 64, 128, 128), (256, 32, 64, 96, 128), [torch.float32] * 5, strict=True),
]
"""(block size, head size, type): every pair of sizes in a type of 16 bits, each size in float32."""


NAN = float("nan")


@dataclass(frozen=True)
class Batch:
    q: Tensor
    k: Tensor
    v: Tensor
    layout: BatchLayout
    selection: Selection
    scale: float

    def to(self, device: str) -> "Batch":
        """Slices of one tensor there too, where copies of slices would be dense."""
        if self.q.device.type == device:
            return self
        parts = (self.q, self.k, self.v)
        q, k, v = torch.cat(parts, 1).to(device).split([x.shape[1] for x in parts], dim=1)
        layout = replace(self.layout, columns=self.layout.columns.to(device))
        mass = self.selection.mass
        mass = None if mass is None else mass.to(device)
        selection = replace(self.selection, counts=self.selection.counts.to(device), mass=mass)
        return Batch(q, k, v, layout, selection, self.scale)

    @property
    def sequences(self) -> list[Placement]:
        return [sequence for _, sequence in self.layout.sequences()]

    @property
    def rows(self) -> Tensor:
        """The rows of q of all sequences, one after another."""
        return _joined([torch.arange(x.queries.start, x.queries.stop) for x in self.sequences])

    @property
    def tokens(self) -> Tensor:
        """The rows of k and v of all sequences, one after another."""
        return _joined([torch.arange(x.keys.start, x.keys.stop) for x in self.sequences])

    def only(self, places: Sequence[int]) -> "Batch":
        """These sequences alone, in this order, amid what the others left in q, k and v."""
        host = self.layout.host[:, places]
        device = self.layout.columns.device
        counts = np.ascontiguousarray(self.selection.host[:, places])
        mass = self.selection.mass
        mass = None if mass is None else mass[list(places)]
        selection = Selection(counts, torch.from_numpy(counts).to(device), mass)
        return replace(self, layout=layout_like(self.layout, host), selection=selection)

    def windows(self, windows: Sequence[tuple[int, int]]) -> "Batch":
        """The query rows [start, end) of each sequence alone; start: first of a tile."""
        host = self.layout.host.copy()
        for column, (start, end) in zip(host.T, windows, strict=True):
            column[:3] = column[0] + start, end - start, start
        return replace(self, layout=layout_like(self.layout, host))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


def layout_like(layout: BatchLayout, host: Any) -> BatchLayout:
    """The same blocks, with the columns of `host` but the tiles, which are numbered anew."""
    own = layout_of(layout.tile, host, layout.columns.device)
    return replace(own, key_block=layout.key_block)


def layout_of(tile: int, host: Any, device: torch.device | str) -> BatchLayout:
    """With the columns of `host` but the tiles, which are numbered anew."""
    names = ("query_starts", "num_rows", "first_rows", "key_starts", "key_lens", "page_rows")
    return BatchLayout.of(tile, device, **dict(zip(names, host[:6], strict=True)))


def make_batch(
    sizes: Sequence[tuple[int, int]],
    block_size: int,
    *,
    query_block_size: int | None = None,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    select: float = 0.3,
    mass: float | None = None,
    spread: float = 1.0,
) -> Batch:
    """Normal q, k, v on the CPU, q times `spread`, as slices of one tensor.

    sizes: (length, prompt length) of each sequence; heads: of queries and of keys
    query_block_size: None: block_size
    """
    lengths = [length for length, _ in sizes]
    (q_starts, size), (k_starts, _) = scattered(lengths), scattered(lengths)
    layout = BatchLayout.of(
        query_block_size or block_size,
        "cpu",
        key_block=block_size,
        query_starts=q_starts,
        num_rows=lengths,
        first_rows=[0] * len(sizes),
        key_starts=k_starts,
        key_lens=lengths,
        page_rows=torch.randperm(len(sizes) + 1)[: len(sizes)],
    )
    prompts, each = [prompt for _, prompt in sizes], len(sizes)
    selection = Selection.of(layout, prompts, [select] * each, [mass] * each)
    fused = torch.randn(size, heads[0] + 2 * heads[1], head_dim)
    fused[:, : heads[0]] *= spread
    q, k, v = fused.to(dtype).split([heads[0], heads[1], heads[1]], dim=1)
    batch = Batch(q, k, v, layout, selection, head_dim**-0.5)
    for x, rows in ((q, batch.rows), (k, batch.tokens), (v, batch.tokens)):
        x[others(rows, size)] = NAN
    return batch


def scattered(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Where sequences begin that lie in random order, a few rows apart; and the rows of all."""
    starts, end = [0] * len(lengths), 3
    for place in torch.randperm(len(lengths)).tolist():
        starts[place] = end
        end += lengths[place] + 3 + place % 2
    return starts, 3 + sum(lengths) + 4 * len(lengths)


def others(rows: Tensor, size: int) -> Tensor:
    """bool [size], all but `rows`"""
    outside = torch.ones(size, dtype=torch.bool)
    outside[rows] = False
    return outside


def logits_of(batch: Batch, sequence: Placement) -> Tensor:
    """Float64 [num_heads, rows, keys], on DEVICE"""
    q, k = batch.q[sequence.queries].to(DEVICE).double(), batch.k[sequence.keys].to(DEVICE).double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return batch.scale * torch.einsum("qhd,khd->hqk", q, k)


def exact_attention(batch: Batch, visible: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp in float64, at all keys of a sequence or the visible ones.

    visible: bool [num_heads, rows, keys] of each sequence
    Returns the rows of all sequences one after another, in the layout's order.
    """
    outs = [torch.empty(0, *batch.q.shape[1:], dtype=torch.float64)]
    masses = [torch.empty(batch.q.shape[1], 0, dtype=torch.float64)]
    for place, sequence in enumerate(batch.sequences):
        logits = logits_of(batch, sequence)
        if visible is not None:
            logits = logits.masked_fill(~visible[place].to(DEVICE), float("-inf"))
        v = batch.v[sequence.keys].to(DEVICE).double()
        v = v.repeat_interleave(len(logits) // v.shape[1], dim=1)
        weights = logits.softmax(-1).nan_to_num(nan=0.0)  # rows that see nothing
        outs.append(torch.einsum("hqk,khd->qhd", weights, v).cpu())
        masses.append(logits.logsumexp(-1).cpu())
    return torch.cat(outs), torch.cat(masses, 1)


def run_attention(
    batch: Batch, attend: Callable[..., Any], *tables: BlockTables, device: str = DEVICE
) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp of the sequences' rows, one sequence after another.

    Into memory full of NaN, which stays where no sequence is.
    """
    batch = batch.to(device)
    out = torch.full_like(batch.q, NAN)
    result, lse = attend(
        batch.q,
        batch.k,
        batch.v,
        batch.layout,
        *(tables_on(device, each) for each in tables),
        scale=batch.scale,
        out=out,
        return_lse=True,
    )
    assert result is out
    assert out[others(batch.rows, len(out)).to(device)].isnan().all()
    rows = batch.rows.to(device)
    return out[rows], lse[:, rows]


def assert_within_rounding(actual: Tensor, exact: Tensor, twin: Tensor) -> None:
    """A kernel may err twice what its torch twin errs against float64; infinities are equal."""
    actual, twin = actual.cpu(), twin.cpu()
    finite = exact.isfinite()
    assert torch.equal(actual[~finite].double(), exact[~finite])
    if not finite.any():
        return
    error = (actual[finite].double() - exact[finite]).abs()
    allowed = 2 * (twin[finite].double() - exact[finite]).abs().max() + _ulp(actual, exact[finite])
    assert error.max() <= allowed, f"off by {error.max():.2e}, allowed {allowed:.2e}"


def _ulp(actual: Tensor, exact: Tensor) -> Tensor:
    """The rounding step of the type at the largest result."""
    return torch.finfo(actual.dtype).eps * exact.abs().max()


def scattered_tables(
    batch: Batch, width: int, dtype: torch.dtype = torch.int16, poison: int = 32767
) -> BlockTables:
    """Tables that hold `poison` everywhere, in random pages, for every token of the sequences.

    Of more heads than these, as where a kernel works on some of them.
    """
    host, num_heads = batch.layout.host, batch.q.shape[1]
    lengths = [num_blocks(length, PAGE) for length in host[KEY_LEN].tolist()]
    pages = torch.full((int(host[PAGE_ROW].max(initial=0)) + 2, max(lengths, default=0) + 1), 10**9)
    free = torch.randperm(2 * sum(lengths) + 3).split([*lengths, sum(lengths) + 3])
    for row, own in zip(host[PAGE_ROW].tolist(), free, strict=False):
        pages[row, : len(own)] = own
    shape = (2 * sum(lengths) + 3, PAGE // batch.layout.tile, num_heads + 3, width)
    kept = torch.full(shape, poison, dtype=dtype)
    num_kept = torch.full(shape[:3], poison, dtype=dtype)
    heads = slice(1, num_heads + 1)
    return BlockTables(kept[:, :, heads], num_kept[:, :, heads], pages.int())


def tables_on(device: str, tables: BlockTables) -> BlockTables:
    """Copies with heads between others', too, so that each kernel writes its own."""
    kept, num_kept = (
        torch.cat([x[:, :, :1], x, x[:, :, :1]], 2).to(device)[:, :, 1:-1]
        for x in (tables.kept, tables.num_kept)
    )
    return BlockTables(kept, num_kept, tables.pages.to(device))


def listed(batch: Batch, tables: BlockTables) -> Tensor:
    """bool [num_heads, num_tiles, max_key_blocks], which blocks the lists name"""
    layout = batch.layout
    mask = torch.zeros(batch.q.shape[1], layout.num_tiles, layout.max_key_blocks, dtype=torch.bool)
    for head, tile, page, row in _rows_of(batch, tables):
        count = int(tables.num_kept[page, row, head])
        mask[head, tile, tables.kept[page, row, head, :count].long()] = True
    return mask


def write_lists(batch: Batch, tables: BlockTables, mask: Tensor) -> None:
    """Lists what bool [num_heads, num_tiles, key blocks] names."""
    for head, tile, page, row in _rows_of(batch, tables):
        ids = mask[head, tile].nonzero().flatten()
        tables.kept[page, row, head, : len(ids)] = ids.to(tables.kept.dtype)
        tables.num_kept[page, row, head] = len(ids)


def _rows_of(batch: Batch, tables: BlockTables) -> list[tuple[int, int, int, int]]:
    """(head, tile, page, row in it) of every list of the batch."""
    return [
        (head, tile, int(page), int(row))
        for sequence in batch.sequences
        for tile, (page, row) in enumerate(
            zip(*tables.rows(sequence), strict=True), sequence.tile_start
        )
        for head in range(batch.q.shape[1])
    ]


def visible_places(batch: Batch, mask: Tensor) -> list[Tensor]:
    """mask [num_heads, num_tiles, key blocks] -> bool [num_heads, rows, keys] of each sequence."""
    layout, visible = batch.layout, []
    for sequence in batch.sequences:
        of_rows = mask[:, tiles_of(batch, sequence)].repeat_interleave(layout.tile, 1)
        blocks = of_rows.repeat_interleave(layout.block_size, 2)
        visible.append(blocks[:, : sequence.num_rows, : sequence.key_len])
    return visible


def check_sparse(batch: Batch, mask: Tensor, attend: Callable[..., Any], **options: Any) -> None:
    """`attend` over the blocks that `mask` names, and its twin, against float64."""
    tables = tables_of(batch, mask, **options)
    for actual, exact, twin in zip(
        run_attention(batch, attend, tables),
        exact_attention(batch, visible_places(batch, mask)),
        run_attention(batch, reference.block_sparse_attention, tables, device="cpu"),
        strict=True,
    ):
        assert_within_rounding(actual, exact, twin)


def random_mask(batch: Batch, share: float) -> Tensor:
    """bool [num_heads, num_tiles, max_key_blocks], each block of a sequence with odds `share`."""
    layout = batch.layout
    mask = torch.rand(batch.q.shape[1], layout.num_tiles, layout.max_key_blocks) < share
    return mask & existing(batch)


def existing(batch: Batch) -> Tensor:
    """bool [num_tiles, max_key_blocks], which key blocks each tile's sequence has"""
    layout = batch.layout
    mask = torch.zeros(layout.num_tiles, layout.max_key_blocks, dtype=torch.bool)
    for sequence in batch.sequences:
        key_blocks = num_blocks(sequence.key_len, layout.block_size)
        mask[tiles_of(batch, sequence), :key_blocks] = True
    return mask


def tiles_of(batch: Batch, sequence: Placement) -> slice:
    """A sequence's tiles among those of all."""
    count = num_blocks(sequence.num_rows, batch.layout.tile)
    return slice(sequence.tile_start, sequence.tile_start + count)


def tables_of(batch: Batch, mask: Tensor, **options: Any) -> BlockTables:
    """The rest of each row names blocks that do not exist: it must not be read."""
    most = max(mask.sum(-1).flatten().tolist(), default=0)
    tables = scattered_tables(batch, most + 2, **options)
    write_lists(batch, tables, mask)
    return tables
