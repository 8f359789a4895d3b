# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""One step of a batch on a worker: its requests, what each does, and the rows that are read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsed_vllm.canvases import CanvasPlaces, CanvasStep
from sparsed_vllm.kernels.choice import Choice
from sparsed_vllm.kernels.layout import PAGE, places_within, send
from sparsed_vllm.pages import PageWrites
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.refresh import LightRows, ReadRows
from sparsed_vllm.steps import Cursor, Phase, Plan, Source, Step
from sparsed_vllm.unmasking import choice_of


class TokenPolicy(NamedTuple):
    """How the tokens of a request's rows are chosen; rows of one policy are worked on together.

    stop_tokens: which the first `min_tokens` places do not take
    logprobs: alternatives to report; None: report nothing
    """

    choice: Choice
    stop_tokens: tuple[int, ...]
    logprobs: int | None

    @classmethod
    def of(cls, params: DenoisingParams) -> "TokenPolicy":
        return cls(choice_of(params), params.stop_tokens, params.logprobs)


class DenoisingRequest:
    """A running request on a worker. Its tokens are in Canvases, under its slot."""

    def __init__(self, slot: int, plan: Plan, num_final: int) -> None:
        self.slot = slot
        self.cursor = Cursor(plan, num_final)
        self.policy = TokenPolicy.of(plan.params)

    @property
    def plan(self) -> Plan:
        return self.cursor.plan


@dataclass(frozen=True)
class DenoisingBatch:
    """What one step does with each request of a batch, in batch order.

    req_ids;  requests;  steps: what each does
    starts int32 [num_reqs + 1]: where each begins among the batch's rows
    canvas: the step of their canvases
    light: the rows of light steps;  writes: where keys and values of requests with reuse go
    reads: the rows whose attention decides what the next light steps compute
    mass float32 [num_slots, longest]: where it is noted, as in ContextMass
    """

    req_ids: Sequence[str]
    requests: Sequence[DenoisingRequest]
    steps: Sequence[Step]
    starts: NDArray[np.int32]
    canvas: CanvasStep
    light: LightRows | None = None
    writes: PageWrites | None = None
    reads: ReadRows | None = None
    mass: Tensor | None = None

    @property
    def pairs(self) -> Iterator[tuple[Step, Plan]]:
        """Each request's step and plan."""
        return zip(self.steps, self.plans, strict=True)

    @property
    def plans(self) -> list[Plan]:
        return [request.plan for request in self.requests]

    def rows_of_requests(self) -> Iterator[tuple[int, int, int]]:
        """Each request that reads rows, and its rows [first, end) among those that are read."""
        first = 0
        for i in self.canvas.order:
            end = first + self.steps[i].num_open
            if end > first:
                yield i, first, end
            first = end

    @property
    def recording(self) -> list[int]:
        """The requests that record a table in this step."""
        return [i for i, step in enumerate(self.steps) if step.phase is Phase.RECORDING]


@dataclass(frozen=True)
class RowWindows:
    """The rows that the last layer computes: whole query blocks around those that are read.

    firsts, sizes int64 [num_reqs]: rows [first, first + size) of those that a sequence computes
    rows int64 [sum(sizes)]: which rows of the batch they are, on the device
    """

    firsts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    rows: Tensor

    @classmethod
    def of(
        cls,
        starts: NDArray[np.int32],
        firsts: NDArray[np.int64],
        ends: NDArray[np.int64],
        device: torch.device,
    ) -> "RowWindows":
        """Rows [first, end) of sequences that begin at `starts` [num_reqs + 1] of the batch."""
        sizes = ends - firsts
        rows = np.repeat(starts[:-1] + firsts, sizes) + places_within(sizes)
        return cls(firsts, sizes, send(rows, device))


def canvas_places(
    starts: NDArray[np.int32],
    steps: Sequence[Step],
    plans: Sequence[Plan],
    firsts: NDArray[np.int64],
    shift: int,
) -> CanvasPlaces:
    """Where the canvases of a batch lie in it; firsts: see window_bounds"""
    begins = np.array([p.prompt_len - s.first_row for s, p in zip(steps, plans, strict=True)])
    rows = starts[:-1] + begins + np.array([step.num_chosen for step in steps])
    return CanvasPlaces(np.maximum(-begins, 0), rows, rows - shift, starts[:-1] + firsts)


def window_bounds(
    starts: NDArray[np.int32], steps: Sequence[Step], plans: Sequence[Plan], shift: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last row of each sequence's window, the latter excluded.

    Windows begin and end with pages, which all block sizes divide, so that every kernel meets the
    tiles that it meets in the other layers.
    """
    lengths = np.diff(starts).astype(np.int64)
    blocks = np.array([(step.block.start, step.end) for step in steps])
    reach = blocks + np.array([plan.prompt_len - shift for plan in plans])[:, None]
    firsts = np.maximum(reach[:, 0] // PAGE * PAGE, 0)
    ends = np.minimum(-(-reach[:, 1] // PAGE) * PAGE, lengths)
    whole = np.array([needs_all_rows(step) for step in steps])
    return np.where(whole, 0, firsts), np.where(whole, lengths, ends)


def needs_all_rows(step: Step) -> bool:
    """Whether the last layer computes all rows of a step: for its table, or as they are few."""
    return step.phase is Phase.RECORDING or step.source is Source.PAGES


def page_writes(
    batch: DenoisingBatch, kept: Sequence[int], light: LightRows | None, pages: Tensor
) -> PageWrites:
    """Where a step's keys and values go, of the sequences `kept`.

    pages int32 [num_reqs, most pages]: vLLM's page table
    """
    parts = [
        np.stack([batch.starts[i] + places, places, np.full_like(places, i)])
        for i in kept
        if batch.steps[i].source is Source.FRESH
        for places in [np.arange(batch.steps[i].length)]
    ]
    whole = send(np.concatenate([np.zeros((3, 0), np.int64), *parts], axis=1), pages.device)
    if light is not None:
        whole = torch.cat([whole, torch.stack([light.rows, light.places, light.seqs])], dim=1)
    rows, places, seqs = whole
    page_ids, offsets = pages[seqs, places // PAGE].long(), places % PAGE
    if len(rows) < batch.starts[-1]:
        return PageWrites(rows, page_ids, offsets)
    # All rows of the batch, in its own order: k and v need no copy.
    ordered = torch.empty(2, len(rows), dtype=torch.int64, device=rows.device)
    ordered[:, rows] = torch.stack([page_ids, offsets])
    return PageWrites(slice(len(rows)), *ordered)
