# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The canvases of all requests, in tensors by vLLM's slot: which places are masked, and the rest.

One kernel each opens, fills and hands out the canvases of a whole batch. Nothing here reads a
result on the host: what the host must know beforehand is in the requests' plans (steps.py), exactly
or as a bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.canvas import (
    MIN_TOKENS,
    NUM_COLUMNS,
    NUM_OPEN,
    ROW_START,
    CanvasState,
    OpenRows,
    SequenceEnds,
    SequenceRows,
    StepColumns,
    Taken,
)
from sparsed_vllm.kernels.choice import Noise
from sparsed_vllm.kernels.layout import send
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.steps import Step


@dataclass(frozen=True)
class NewCanvas:
    """A request's canvas as it starts or resumes.

    num_taken: places that were handed out before;  num_filled: those of them, from the first, that
        it starts with (none where it starts over);  tokens: of the places handed out
    """

    slot: int
    num_tokens: int
    seed: int
    num_taken: int = 0
    num_filled: int = 0
    tokens: Sequence[int] = ()


@dataclass(frozen=True)
class CanvasPlaces:
    """Where the canvases of a batch lie among its rows; int64 [num_reqs] each.

    first_places: from which on places are computed
    canvas_rows: the row of each canvas's first place, or where it would be
    read_rows: the row that predicts it, or where that would be
    window_rows: the first row that the last layer computes
    """

    first_places: NDArray[np.int64]
    canvas_rows: NDArray[np.int64]
    read_rows: NDArray[np.int64]
    window_rows: NDArray[np.int64]

    @classmethod
    def alone(cls) -> "CanvasPlaces":
        """Of one canvas that begins at row 0."""
        return cls(*np.zeros((4, 1), np.int64))


@dataclass(frozen=True)
class CanvasStep:
    """One step of the canvases of a batch.

    columns: what their plans say;  rows: those whose logits are read
    order: the requests in the order of their rows, which are those of a policy side by side
    """

    columns: StepColumns
    rows: OpenRows
    order: tuple[int, ...]

    @property
    def places(self) -> Tensor:
        """Those whose logits are read, -1 for padding; int64 [num_rows]."""
        return self.rows.places

    @property
    def noise(self) -> Noise:
        """What the draws of the rows depend on."""
        return Noise(self.rows.seeds, self.rows.places, self.rows.block_steps)

    def is_early(self, rows: slice) -> Tensor:
        """Whether the text may not end yet at the place of each of some rows, bool."""
        min_tokens = self.columns.device[MIN_TOKENS]
        return self.places[rows] < min_tokens[self.rows.reqs[rows]]


class Canvases(CanvasState):
    """The canvases of an engine's requests."""

    def __init__(self, num_slots: int, longest: int, device: torch.device) -> None:
        self.device = device
        shape = (num_slots + 1, longest)
        num_taken, block_steps, seeds = torch.zeros(3, num_slots, dtype=torch.int64, device=device)
        super().__init__(
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
            num_taken,
            block_steps,
            seeds,
            torch.zeros(num_slots, dtype=torch.bool, device=device),
        )

    def add(self, new: Sequence[NewCanvas]) -> None:
        """Open the canvases of requests that start or resume."""
        if not new:
            return
        table = [[c.slot, c.num_tokens, c.num_filled, c.num_taken, _signed(c.seed)] for c in new]
        slots, lengths, filled, taken, seeds = send(np.array(table, np.int64).T.copy(), self.device)
        # Made here: what an engine keeps beside its weights is lost while it sleeps at level 2.
        places = torch.arange(self.longest, device=self.device)
        self.masked[slots] = (places >= filled[:, None]) & (places < lengths[:, None])
        self.num_taken[slots] = taken
        self.seeds[slots] = seeds
        # A number on the right of an assignment would be copied from the host, which waits.
        self.block_steps.index_fill_(0, slots, 0)
        self.has_failed.index_fill_(0, slots, False)
        for canvas in new:
            if canvas.num_taken:
                tokens = np.asarray(canvas.tokens[: canvas.num_taken], np.int32)
                self.tokens[canvas.slot, : canvas.num_taken] = send(tokens, self.device)

    def open(
        self,
        slots: Sequence[int],
        params: Sequence[DenoisingParams],
        steps: Sequence[Step],
        order: Sequence[int],
        places: CanvasPlaces,
    ) -> CanvasStep:
        """The step of a batch: which places of its first unfinished block each request reads.

        order: the requests in the order in which their rows shall lie
        places: where their canvases lie in the batch
        """
        host = _columns_of(slots, params, steps, order, places)
        columns = StepColumns(host, send(host, self.device))
        return CanvasStep(columns, api.open_canvases(self, columns), tuple(order))

    def write_ids(
        self,
        step: CanvasStep,
        input_ids: Tensor,
        mask_token_id: int,
        light: SequenceRows | None = None,
    ) -> None:
        """Write the tokens that the model sees of each canvas, and of the rows `light`.

        input_ids int32 [rows of the batch]
        """
        api.write_ids(self, step.columns, input_ids, mask_token_id, light)

    def fill(
        self,
        step: CanvasStep,
        tokens: Tensor,
        confidence: Tensor,
        largest: Tensor,
        uniform: Tensor | None,
    ) -> Tensor:
        """Fill places of the step with `tokens`; a place handed out before takes its own again.

        tokens int64, confidence float32 [num_rows]
        largest float32 [num_rows]: the largest logit of each, by which logits fail
        uniform float64 [num_rows], in (0, 1): what places are drawn with; None: none are
        Returns bool [num_rows], which rows were chosen.
        """
        given = (tokens, confidence, largest, uniform)
        return api.fill_canvases(self, step.columns, step.rows, *given)

    def take(self, step: CanvasStep, ends: SequenceEnds | None = None) -> Taken:
        """Hand out the tokens that became final and were not handed out yet.

        ends: where vLLM appends them
        """
        return api.take_canvases(self, step.columns, ends)


def _columns_of(
    slots: Sequence[int],
    params: Sequence[DenoisingParams],
    steps: Sequence[Step],
    order: Sequence[int],
    places: CanvasPlaces,
) -> NDArray[np.float64]:
    """[NUM_COLUMNS, num_reqs], in the columns' order"""
    host = np.empty((NUM_COLUMNS, len(slots)))
    plans = [_column(slot, p, step) for slot, p, step in zip(slots, params, steps, strict=True)]
    host[:-4] = np.array(plans, np.float64).T
    host[-4:] = places.first_places, places.canvas_rows, places.read_rows, places.window_rows
    counts = host[NUM_OPEN, list(order)]
    host[ROW_START, list(order)] = np.cumsum(counts) - counts
    return host


def _column(slot: int, params: DenoisingParams, step: Step) -> tuple[float, ...]:
    """What a request's plan says, up to MIN_TOKENS; where its rows begin is not known yet."""
    by_threshold = params.threshold is not None
    return (
        slot,
        params.num_tokens,
        step.end if params.variable_length else params.num_tokens,
        params.block_length,
        step.end,
        -1 if step.block_step is None else step.block_step,
        step.num_open,
        0,
        # A threshold fills the surest place in any case.
        1 if by_threshold else step.num_filled or 0,
        params.threshold if params.threshold is not None else float("inf"),
        step.share,
        params.alg_temp and max(params.alg_temp, 1e-300),
        params.policy == "random",
        step.may_hand_out,
        params.early_stop,
        step.is_last,
        params.min_tokens,
    )


def _signed(seed: int) -> int:
    """A seed of 64 bits as the int64 of the same bits."""
    seed &= (1 << 64) - 1
    return seed - (seed >> 63 << 64)
