# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How the sequences of a step attend: the launches of its kernels, and their layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparsed_vllm.batch import DenoisingBatch, RowWindows
from sparsed_vllm.flash import PackedSequences
from sparsed_vllm.kernels.layout import (
    PAGE_ROW,
    BatchLayout,
    Selection,
    host_layout,
    send,
    send_layouts,
)
from sparsed_vllm.pages import PageWrites
from sparsed_vllm.refresh import ReadRows
from sparsed_vllm.steps import Phase, Source

DENSE_ROWS = 64  # query rows that the dense kernels without FlashAttention work on together
FEW_ROWS = 256  # of a light step, which our kernel attends for even where FlashAttention is


class Kind(NamedTuple):
    """What sequences of one launch have in common.

    source: where their keys and values come from;  phase: whether they record or follow tables
    tile: query rows of a tile, which for tables is a query block
    is_packed: whether FlashAttention serves them
    key_block: tokens of a key block, for tables
    """

    source: Source
    phase: Phase
    tile: int
    is_packed: bool = False
    key_block: int | None = None


DENSE_FRESH = Kind(Source.FRESH, Phase.DENSE, DENSE_ROWS)
DENSE_LIGHT = DENSE_FRESH._replace(source=Source.PAGES)


class Member(NamedTuple):
    """Rows of a sequence in a launch: [skipped, skipped + num_rows) of those that it computes.

    first_row: the place in the sequence of the first, where tables matter
    """

    seq: int
    skipped: int
    num_rows: int
    first_row: int


@dataclass(frozen=True)
class MassRows:
    """Rows of a launch whose softmax mass on their sequences' tokens is noted.

    rows int64 [n]: of q;  layout: their sequences, whose rows lie side by side among these
    weights float32 [n];  slots int64 [num_seqs]: rows of the record
    """

    rows: Tensor
    layout: BatchLayout
    weights: Tensor
    slots: Tensor

    def only(self, page_row: int) -> MassRows | None:
        """Those of one sequence; None if none of its rows are noted."""
        (found,) = np.nonzero(self.layout.host[PAGE_ROW] == page_row)
        if not len(found):
            return None
        seq = int(found[0])
        return replace(self, layout=self.layout.only(seq), slots=self.slots[seq : seq + 1])


@dataclass(frozen=True)
class Launch:
    """Sequences that one call of a kernel serves.

    packed: the same as FlashAttention takes them, if it does
    selection: of sequences that record tables
    mass: those of their rows whose mass is noted
    """

    kind: Kind
    layout: BatchLayout
    packed: PackedSequences | None = None
    selection: Selection | None = None
    mass: MassRows | None = None

    def only(self, seq: int) -> Launch:
        """One of the sequences."""
        selection = None if self.selection is None else self.selection.only(seq)
        row = int(self.layout.host[PAGE_ROW, seq])
        mass = None if self.mass is None else self.mass.only(row)
        return replace(self, layout=self.layout.only(seq), selection=selection, mass=mass)


@dataclass(frozen=True)
class SparsedMetadata:
    """The launches of a step: one of each kind.

    dense: sequences that attend to all keys, recording ones among them;  tables: that record or
        follow tables
    pages int32 [num_seqs, most pages]: vLLM's page table
    writes: the rows whose keys and values are kept in pages; None: none are
    mass float32 [num_slots, longest]: where softmax mass is noted
    last_layer: the same for the rows that the last layer computes; None: it computes all
    """

    dense: tuple[Launch, ...]
    tables: tuple[Launch, ...]
    pages: Tensor
    writes: PageWrites | None = None
    mass: Tensor | None = None
    last_layer: SparsedMetadata | None = None


def plan_launches(
    starts: NDArray[np.int32],
    pages: Tensor,
    batch: DenoisingBatch | None = None,
    windows: RowWindows | None = None,
    *,
    with_flash: bool = False,
) -> SparsedMetadata:
    """The metadata of a step.

    starts int32 [num_seqs + 1]: where each sequence begins among the rows
    batch: None: all sequences attend to everything (vLLM's dummy batches)
    windows: the rows that the last layer computes; None: all
    with_flash: whether FlashAttention serves dense sequences
    """
    members = _members(batch, np.diff(starts), with_flash)
    kinds = [(kind, np.array(rows).T) for kind, rows in members.items()]
    views = [_View.whole(starts, batch)]
    if windows is not None:
        views.append(views[0].narrowed(windows))
    hosts = [
        (kind.tile, kind.key_block, view.layout(kind, rows))
        for view in views
        for kind, rows in kinds
    ]
    layouts = iter(send_layouts(hosts, pages.device))
    made = []
    for view in views:
        launches = [
            _launch(view, kind, rows[0].tolist(), next(layouts), batch, pages)
            for kind, rows in kinds
        ]
        dense = tuple(x for x in launches if x.kind.phase is Phase.DENSE)
        tables = tuple(x for x in launches if x.kind.phase is not Phase.DENSE)
        metadata = SparsedMetadata(dense, tables, pages)
        if batch is not None:
            metadata = replace(metadata, writes=batch.writes, mass=batch.mass)
        made.append(metadata)
    return made[0] if windows is None else replace(made[0], last_layer=made[1])


def _members(
    batch: DenoisingBatch | None, lengths: NDArray[np.int32], with_flash: bool
) -> dict[Kind, list[Member]]:
    """The sequences by kind; recording ones are dense as well."""
    fresh = DENSE_FRESH._replace(is_packed=with_flash)
    if batch is None:
        return {fresh: [Member(i, 0, n, 0) for i, n in enumerate(lengths.tolist())]}
    members: dict[Kind, list[Member]] = {}
    for i, (step, request) in enumerate(zip(batch.steps, batch.requests, strict=True)):
        chosen, rest = step.num_chosen, step.num_rows - step.num_chosen
        # Lists are those of whole blocks: tokens that were chosen lie scattered.
        num_dense = chosen if step.phase is Phase.SPARSE else step.num_rows
        dense = fresh if step.source is Source.FRESH else light_kind(num_dense, with_flash)
        if num_dense:
            members.setdefault(dense, []).append(Member(i, 0, num_dense, 0))
        if step.phase is not Phase.DENSE:
            assert request.plan.sparsity is not None
            sparsity = request.plan.sparsity
            kind = Kind(step.source, step.phase, sparsity.tile, key_block=sparsity.block_size)
            members.setdefault(kind, []).append(Member(i, chosen, rest, step.first_row))
    return members


def light_kind(num_rows: int, with_flash: bool) -> Kind:
    """How a sequence attends densely in a light step of so many rows.

    By its own number of rows, so that batch mates do not change its result.
    """
    return DENSE_LIGHT._replace(is_packed=with_flash and num_rows > FEW_ROWS)


class _View(NamedTuple):
    """Where the rows of a step's sequences lie in q; int [num_seqs] each.

    begins: of the first;  firsts, sizes: rows [first, first + size) of those that a sequence
    computes are in q;  keys: where its keys begin among the step's own;  lengths: its tokens
    """

    begins: NDArray[Any]
    firsts: NDArray[Any]
    sizes: NDArray[Any]
    keys: NDArray[Any]
    lengths: NDArray[Any]

    @property
    def shifts(self) -> NDArray[Any]:
        """[num_seqs] from a row of the batch to the same row in q."""
        return self.begins - self.firsts - self.keys

    @classmethod
    def whole(cls, starts: NDArray[np.int32], batch: DenoisingBatch | None) -> _View:
        sizes = np.diff(starts)
        lengths = sizes
        if batch is not None:
            lengths = np.array([step.length for step in batch.steps])
        return cls(starts[:-1], np.zeros_like(sizes), sizes, starts[:-1], lengths)

    def narrowed(self, windows: RowWindows) -> _View:
        begins = np.cumsum(windows.sizes) - windows.sizes
        return self._replace(begins=begins, firsts=windows.firsts, sizes=windows.sizes)

    def layout(self, kind: Kind, members: NDArray[Any]) -> NDArray[np.int32]:
        """members: [4, n] the launch's Members, a row a field"""
        seqs, skipped, num_rows, first_rows = members
        ends = self.firsts[seqs] + self.sizes[seqs]
        begin = np.maximum(skipped, self.firsts[seqs])
        count = np.minimum(skipped + num_rows, ends) - begin
        lists = kind.phase is not Phase.DENSE
        return host_layout(
            kind.tile,
            query_starts=self.begins[seqs] + begin - self.firsts[seqs],
            num_rows=count,
            first_rows=first_rows + begin - skipped if lists else np.zeros_like(begin),
            key_starts=self.keys[seqs],
            key_lens=self.lengths[seqs],
            page_rows=seqs,
        )


def _launch(
    view: _View,
    kind: Kind,
    seqs: list[int],
    layout: BatchLayout,
    batch: DenoisingBatch | None,
    pages: Tensor,
) -> Launch:
    packed = None
    if kind.is_packed:
        packed = PackedSequences.of(layout, pages if kind.source is Source.PAGES else None)
    launch = Launch(kind, layout, packed)
    if batch is None:
        return launch
    if kind.phase is Phase.RECORDING:
        return replace(launch, selection=_selection(batch, layout, seqs))
    seqs = [i for i in seqs if _is_read(kind, batch, i)]
    if batch.reads is None or not seqs:
        return launch
    return replace(launch, mass=_mass_rows(view, batch.reads, seqs, pages))


def _is_read(kind: Kind, batch: DenoisingBatch, seq: int) -> bool:
    """Whether rows that a sequence reads are in a launch, and their mass is noted."""
    if batch.reads is None or seq not in batch.reads.spans or kind.phase is Phase.RECORDING:
        return False
    # Of a sparse light step these follow lists; the tokens that it attends densely for are others.
    return (batch.steps[seq].phase is Phase.SPARSE) == (kind.phase is Phase.SPARSE)


def _mass_rows(view: _View, reads: ReadRows, seqs: list[int], pages: Tensor) -> MassRows:
    """seqs: sequences of one launch that are read"""
    begins, counts = np.array([reads.spans[i] for i in seqs]).T
    host = host_layout(
        DENSE_ROWS,
        query_starts=begins,
        num_rows=counts,
        key_lens=view.lengths[seqs],
        page_rows=seqs,
    )
    (layout,) = send_layouts([(DENSE_ROWS, None, host)], pages.device)
    slots = send(np.array([reads.slots[i] for i in seqs]), pages.device)
    rows = reads.rows.batch_rows
    if view.shifts.any():
        rows = rows + send(view.shifts, pages.device)[reads.rows.reqs]
    return MassRows(rows, layout, reads.weights, slots)


def _selection(batch: DenoisingBatch, layout: BatchLayout, seqs: list[int]) -> Selection:
    plans = [batch.requests[i].plan for i in seqs]
    settings = [plan.sparsity for plan in plans if plan.sparsity is not None]
    return Selection.of(
        layout,
        [plan.prompt_len for plan in plans],
        [sparsity.select for sparsity in settings],
        [sparsity.mass for sparsity in settings],
    )
