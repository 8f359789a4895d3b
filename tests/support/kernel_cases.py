# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Packed batches for the kernel tests, what float64 makes of them, and how far off is too far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsed_vllm.kernels import reference
from sparsed_vllm.kernels.layout import QueryBlocks, Span, Window

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


@dataclass(frozen=True)
class Batch:
    q: Tensor
    k: Tensor
    v: Tensor
    blocks: QueryBlocks
    scale: float

    def to(self, device: str) -> "Batch":
        """Slices of one tensor there too, where copies of slices would be dense."""
        if self.q.device.type == device:
            return self
        blocks = QueryBlocks.of(self.blocks.spans, self.blocks.block_size, device)
        if blocks.has_windows:
            q, k, v = (x.to(device) for x in (self.q, self.k, self.v))
            return replace(self, q=q, k=k, v=v, blocks=blocks)
        parts = (self.q, self.k, self.v)
        q, k, v = torch.cat(parts, 1).to(device).split([x.shape[1] for x in parts], dim=1)
        return replace(self, q=q, k=k, v=v, blocks=blocks)


def make_batch(
    sizes: Sequence[tuple[int, int]],
    block_size: int,
    *,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    select: float = 0.3,
    spread: float = 1.0,
) -> Batch:
    """Normal q, k, v on the CPU, q times `spread`, as slices of one tensor.

    sizes: (length, prompt length) of each sequence; heads: of queries and of keys
    """
    spans, first = [], 0
    for length, prompt_length in sizes:
        spans.append(Span(first, length, prompt_length, select))
        first += length
    fused = torch.randn(first, heads[0] + 2 * heads[1], head_dim)
    fused[:, : heads[0]] *= spread
    q, k, v = fused.to(dtype).split([heads[0], heads[1], heads[1]], dim=1)
    return Batch(q, k, v, QueryBlocks.of(spans, block_size, "cpu"), head_dim**-0.5)


def in_windows(batch: Batch, windows: Sequence[tuple[int, int]]) -> tuple[Batch, Tensor, Tensor]:
    """`batch` with the queries of each sequence's tokens [start, end) alone, laid end to end.

    Returns it, which of all rows of q those are, and which of all query blocks.
    """
    spans, rows, blocks, size = [], [], [], batch.blocks.block_size
    for (span, places), (start, end) in zip(batch.blocks.by_span(), windows, strict=True):
        spans.append(replace(span, window=Window(len(rows), start, end)))
        rows += range(span.first + start, span.first + end)
        blocks += range(places.start + start // size, places.start - (-end // size))
    narrow = QueryBlocks.of(spans, size, batch.blocks.starts.device)
    q = batch.q[rows]
    return replace(batch, q=q, blocks=narrow), torch.tensor(rows), torch.tensor(blocks)


def logits_of(batch: Batch, span: Span) -> Tensor:
    """Float64 [num_heads, length, length], on DEVICE"""
    tokens = slice(span.first, span.first + span.length)
    q, k = (x[tokens].to(DEVICE).double() for x in (batch.q, batch.k))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return batch.scale * torch.einsum("qhd,khd->hqk", q, k)


def exact_attention(
    batch: Batch, visible: dict[Span, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp in float64, at all places of a sequence or the visible ones.

    visible: bool [num_heads, length, length] of each sequence
    """
    out = torch.zeros(batch.q.shape, dtype=torch.float64)
    lse = torch.zeros(batch.q.shape[1::-1], dtype=torch.float64)
    for span in batch.blocks.spans:
        tokens = slice(span.first, span.first + span.length)
        logits = logits_of(batch, span)
        if visible is not None:
            logits = logits.masked_fill(~visible[span].to(DEVICE), float("-inf"))
        v = batch.v[tokens].to(DEVICE).double()
        v = v.repeat_interleave(len(logits) // v.shape[1], dim=1)
        weights = logits.softmax(-1).nan_to_num(nan=0.0)  # rows that see nothing
        out[tokens] = torch.einsum("hqk,khd->qhd", weights, v)
        lse[:, tokens] = logits.logsumexp(-1)
    return out, lse


def assert_within_rounding(actual: Tensor, exact: Tensor, twin: Tensor) -> None:
    """A kernel may err twice what its torch twin errs against float64; infinities are equal."""
    actual, twin = actual.cpu(), twin.cpu()
    finite = exact.isfinite()
    assert torch.equal(actual[~finite].double(), exact[~finite])
    error = (actual[finite].double() - exact[finite]).abs()
    allowed = 2 * (twin[finite].double() - exact[finite]).abs().max() + _ulp(actual, exact[finite])
    assert error.max() <= allowed, f"off by {error.max():.2e}, allowed {allowed:.2e}"


def _ulp(actual: Tensor, exact: Tensor) -> Tensor:
    """The rounding step of the type at the largest result."""
    return torch.finfo(actual.dtype).eps * exact.abs().max()


@dataclass(frozen=True)
class Table:
    """Lists of key blocks as vLLM's pages hold them: rows far apart, with others' data between."""

    kept: Tensor  # [num_rows, num_heads, width]
    num_kept: Tensor  # int32 [num_rows, num_heads]
    rows: Tensor  # int64 [num_blocks]

    @classmethod
    def scattered(
        cls, batch: Batch, width: int, dtype: torch.dtype = torch.int16, poison: int = 32767
    ) -> "Table":
        """A table that holds `poison` everywhere, for query blocks in random rows."""
        num_heads, num_blocks = batch.q.shape[1], batch.blocks.num_blocks
        kept = torch.full((2 * num_blocks + 3, num_heads, width), poison, dtype=dtype)
        num_kept = torch.full(kept.shape[:2], poison, dtype=torch.int32)
        return cls(kept, num_kept, torch.randperm(kept.shape[0])[:num_blocks])

    def to(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernels take; copies, so that each writes its own."""
        kept, num_kept, rows = (x.to(device, copy=True) for x in vars(self).values())
        return kept, num_kept, rows

    def mask(self, max_key_blocks: int) -> Tensor:
        """bool [num_heads, num_blocks, max_key_blocks] which blocks the lists name."""
        kept, counts = self.kept[self.rows].long(), self.num_kept[self.rows, :, None]
        listed = torch.arange(kept.shape[2]) < counts
        mask = torch.zeros(*kept.shape[:2], max_key_blocks + 1, dtype=torch.bool)
        mask.scatter_(2, kept.where(listed, max_key_blocks), True)
        return mask[:, :, :max_key_blocks].transpose(0, 1)

    def write(self, masks: Tensor) -> None:
        """Lists what bool [num_heads, num_blocks, key blocks] names."""
        for head, block in [(h, b) for h in range(masks.shape[0]) for b in range(masks.shape[1])]:
            ids, row = masks[head, block].nonzero().flatten(), self.rows[block]
            self.kept[row, head, : len(ids)] = ids.to(self.kept.dtype)
            self.num_kept[row, head] = len(ids)


def visible_places(batch: Batch, mask: Tensor) -> dict[Span, Tensor]:
    """mask [num_heads, num_blocks, key blocks] -> bool [num_heads, length, length] of each."""
    size, visible = batch.blocks.block_size, {}
    for span, places in batch.blocks.by_span():
        blocks = mask[:, places].repeat_interleave(size, 1).repeat_interleave(size, 2)
        visible[span] = blocks[:, : span.length, : span.length]
    return visible


def run_sparse(
    batch: Batch, table: Table, attend: Callable[..., Any], device: str = DEVICE
) -> tuple[Tensor, Tensor]:
    """Attention over the table's lists and its log-sum-exp, into memory full of NaN."""
    batch = batch.to(device)
    out = torch.full_like(batch.q, float("nan"))
    options = {"scale": batch.scale, "out": out, "return_lse": True}
    result, lse = attend(batch.q, batch.k, batch.v, batch.blocks, *table.to(device), **options)
    assert result is out
    return result, lse


def check_sparse(batch: Batch, mask: Tensor, attend: Callable[..., Any], **options: Any) -> None:
    """`attend` over the blocks that `mask` names, and its twin, against float64."""
    table = table_of(batch, mask, **options)
    for actual, exact, twin in zip(
        run_sparse(batch, table, attend),
        exact_attention(batch, visible_places(batch, mask)),
        run_sparse(batch, table, reference.block_sparse_attention, "cpu"),
        strict=True,
    ):
        assert_within_rounding(actual, exact, twin)


def random_mask(batch: Batch, share: float) -> Tensor:
    """bool [num_heads, num_blocks, max_key_blocks], each block of a sequence with odds `share`."""
    blocks = batch.blocks
    mask = torch.rand(batch.q.shape[1], blocks.num_blocks, blocks.max_key_blocks) < share
    num_key_blocks = -(-blocks.lengths // blocks.block_size)
    return mask & (torch.arange(blocks.max_key_blocks) < num_key_blocks[:, None])


def table_of(batch: Batch, mask: Tensor, **options: Any) -> Table:
    """The rest of each row names blocks that do not exist: it must not be read."""
    table = Table.scattered(batch, int(mask.sum(-1).max()) + 2, **options)
    table.write(mask)
    return table
