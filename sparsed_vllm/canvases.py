# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The canvases of all requests, in tensors by vLLM's slot: which places are masked, and the rest.

One call opens, fills and hands out the canvases of a whole batch. Nothing here reads a result on
the host: what the host must know beforehand is in the requests' plans (steps.py), exactly or as a
bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsed_vllm.kernels.choice import Noise
from sparsed_vllm.kernels.layout import send
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.steps import Step
from sparsed_vllm.unmasking import choose_places


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
class CanvasStep:
    """One step of the canvases of a batch.

    host float64 [len(_COLUMNS), num_reqs]: what their plans say;  columns: the same on the device
    slots int64 [num_reqs]
    order: the requests in the order of their rows, which are those of a policy side by side
    places int64 [num_rows]: the places whose logits are read, ascending in each request, -1 for
        padding;  reqs int64 [num_rows]: whose they are, in batch order
    """

    host: np.ndarray
    columns: Tensor
    slots: Tensor
    order: tuple[int, ...]
    places: Tensor
    reqs: Tensor

    def __getitem__(self, name: str) -> Tensor:
        """A column on the device, float64 [num_reqs]."""
        return self.columns[_COLUMNS.index(name)]

    def count(self, name: str) -> Tensor:
        """A column of whole numbers, int64 [num_reqs]."""
        return self[name].long()

    def most(self, name: str) -> int:
        """The largest number of a column."""
        return int(self.host[_COLUMNS.index(name)].max())


_COLUMNS = (
    "slot",
    "num_tokens",
    "block_length",
    "end",  # no place from there on is open
    "block_step",  # -1: only the device knows
    "num_open",
    "row_start",  # where its rows begin among those of all
    "num_filled",  # places to fill by rank
    "threshold",  # confidence from which places are filled besides; infinity: none
    "share",  # probability with which each open place is filled besides
    "alg_temp",
    "by_chance",  # whether chance stands in for confidence
    "may_hand_out",
    "early_stop",
    "is_last",
    "min_tokens",
)


class Canvases:
    """Preallocated, as vLLM keeps its own request states.

    tokens int32 [num_slots + 1, longest]: of each place; of a masked one that was handed out, the
        token that it will be filled with again, else undefined. The last row takes what is written
        for padding.
    masked bool, of the same shape: the record of what is masked; never inferred from the token
    num_taken int64 [num_slots]: places handed out
    block_steps int64 [num_slots]: steps that the current block has had
    seeds int64 [num_slots];  has_failed bool [num_slots]: whether its logits were no numbers
    """

    def __init__(self, num_slots: int, longest: int, device: torch.device) -> None:
        self.longest = longest
        self.device = device
        self.tokens = torch.zeros(num_slots + 1, longest, dtype=torch.int32, device=device)
        self.masked = torch.zeros(num_slots + 1, longest, dtype=torch.bool, device=device)
        self.num_taken, self.block_steps, self.seeds = torch.zeros(
            3, num_slots, dtype=torch.int64, device=device
        )
        self.has_failed = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self._places = torch.arange(longest, device=device)

    def add(self, new: Sequence[NewCanvas]) -> None:
        """Open the canvases of requests that start or resume."""
        if not new:
            return
        table = [[c.slot, c.num_tokens, c.num_filled, c.num_taken, _signed(c.seed)] for c in new]
        slots, lengths, filled, taken, seeds = send(np.array(table, np.int64).T.copy(), self.device)
        self.masked[slots] = (self._places >= filled[:, None]) & (self._places < lengths[:, None])
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
    ) -> CanvasStep:
        """The step of a batch: which places of its first unfinished block each request reads.

        order: the requests in the order in which their rows shall lie
        """
        host = _columns_of(slots, params, steps, order)
        columns = send(host, self.device)
        num_open = host[_COLUMNS.index("num_open")].astype(np.int64)
        reqs = send(np.repeat(order, num_open[list(order)]).astype(np.int64), self.device)
        step = CanvasStep(host, columns, columns[0].long(), tuple(order), reqs, reqs)
        masked = self.masked[step.slots, : step.most("num_tokens")]
        places = self._places[: masked.shape[1]]
        lengths = step.count("block_length")
        block = _first(masked) // lengths
        is_open = masked & (places // lengths[:, None] == block[:, None])
        is_open &= places < step.count("end")[:, None]
        rank = is_open.cumsum(1) - 1
        is_read = is_open & (rank < step.count("num_open")[:, None])
        rows = torch.where(is_read, step.count("row_start")[:, None] + rank, len(reqs))
        found = places.new_full((len(reqs) + 1,), -1)
        found.scatter_(0, rows.flatten(), places.expand_as(rows).flatten())
        return CanvasStep(host, columns, step.slots, step.order, found[: len(reqs)], reqs)

    def noise(self, step: CanvasStep) -> Noise:
        """What the draws of the step's rows depend on."""
        known = step.count("block_step")
        block_steps = torch.where(known >= 0, known, self.block_steps[step.slots])
        return Noise(self.seeds[step.slots][step.reqs], step.places, block_steps[step.reqs])

    def write_ids(
        self,
        step: CanvasStep,
        rows: Tensor,
        first_places: Tensor,
        input_ids: Tensor,
        mask_token_id: int,
    ) -> None:
        """Write the tokens that the model sees of each canvas from a place on.

        rows int64 [num_reqs]: of each canvas's first place, or where it would be
        first_places int64 [num_reqs]: from which on places are computed
        """
        last = step.count("num_tokens")[:, None] - 1
        # Other places write the first or the last one again.
        places = torch.minimum(self._places[: step.most("num_tokens")], last)
        places = torch.maximum(places, first_places[:, None])
        tokens = self.seen(step.slots[:, None], places)
        tokens = tokens.masked_fill(tokens < 0, mask_token_id)
        input_ids[rows[:, None] + places] = tokens.to(input_ids.dtype)

    def seen(self, slots: Tensor, places: Tensor) -> Tensor:
        """The tokens of places, int32, -1 where they are masked."""
        return self.tokens[slots, places].masked_fill(self.masked[slots, places], -1)

    def fill(
        self, step: CanvasStep, tokens: Tensor, confidence: Tensor, uniform: Tensor | None
    ) -> Tensor:
        """Fill places of the step with `tokens`; a place handed out before takes its own again.

        tokens int64, confidence float [num_rows]
        uniform float64 [num_rows], in (0, 1): what places are drawn with; None: none are
        Returns bool [num_rows], which rows were chosen.
        """
        is_open = step.places >= 0
        chosen = choose_places(step, confidence, uniform) & is_open
        slots = step.slots[step.reqs]
        handed_out = step.places < self.num_taken[slots]
        trash = self.tokens.numel() - 1
        index = torch.where(chosen, slots * self.longest + step.places, trash)
        flat = self.tokens.view(-1)
        flat[index] = torch.where(handed_out, flat[index], tokens.to(flat.dtype))
        before = self._current_block(step)
        self.masked.view(-1).index_fill_(0, index, False)
        ran_on = self._current_block(step) == before
        self.block_steps[step.slots] = torch.where(ran_on, self.block_steps[step.slots] + 1, 0)
        return chosen

    def _current_block(self, step: CanvasStep) -> Tensor:
        """The first block with a masked place; block 0 of a canvas that has none."""
        masked = self.masked[step.slots, : step.most("num_tokens")]
        return _first(masked) // step.count("block_length")

    def fail(self, step: CanvasStep, largest: Tensor) -> None:
        """Note whose logits were no numbers; largest [num_rows]: the largest logit of each."""
        bad = torch.zeros_like(step.slots).index_add_(0, step.reqs, (~largest.isfinite()).long())
        self.has_failed[step.slots] |= bad > 0

    def take(self, step: CanvasStep) -> tuple[Tensor, Tensor, Tensor]:
        """Hand out the tokens that became final and were not handed out yet.

        Returns tokens int64 [num_reqs, width], how many of each request's count, int64 [num_reqs],
        and places int64 [num_reqs, width], where they stand.
        """
        taken = self.num_taken[step.slots]
        # A request that starts over does not hand out twice what it handed out before.
        final = torch.maximum(self._num_final(step), taken)
        final = torch.where(step["may_hand_out"] > 0, final, taken)
        self.num_taken[step.slots] = final
        last = step.count("num_tokens")[:, None] - 1
        places = torch.minimum(taken[:, None] + self._places[: _width(step)], last)
        return self.tokens[step.slots[:, None], places].long(), final - taken, places

    def _num_final(self, step: CanvasStep) -> Tensor:
        """How many places may have been handed out after the step; int64 [num_reqs]."""
        masked = self.masked[step.slots, : step.most("num_tokens")]
        num_tokens, lengths = step.count("num_tokens"), step.count("block_length")
        finished = _first(masked) // lengths * lengths
        final = torch.where(masked.any(1), finished, num_tokens)
        final = torch.where(step["early_stop"] > 0, final, final // num_tokens * num_tokens)
        # Logits that are not numbers can leave a place unfilled; the request ends all the same.
        return torch.where(step["is_last"] > 0, num_tokens, final)


def _columns_of(
    slots: Sequence[int],
    params: Sequence[DenoisingParams],
    steps: Sequence[Step],
    order: Sequence[int],
) -> np.ndarray:
    host = np.array(
        [_column(slot, p, step) for slot, p, step in zip(slots, params, steps, strict=True)]
    ).T.copy()
    row_start, num_open = _COLUMNS.index("row_start"), _COLUMNS.index("num_open")
    counts = host[num_open, list(order)]
    host[row_start, list(order)] = np.cumsum(counts) - counts
    return host


def _column(slot: int, params: DenoisingParams, step: Step) -> tuple[float, ...]:
    by_threshold = params.threshold is not None
    return (
        slot,
        params.num_tokens,
        params.block_length,
        step.end,
        -1 if step.block_step is None else step.block_step,
        step.num_open,
        0,
        # A threshold fills the surest place in any case.
        1 if by_threshold else step.num_filled or 0,
        params.threshold if params.threshold is not None else float("inf"),
        step.share,
        params.alg_temp,
        params.policy == "random",
        step.may_hand_out,
        params.early_stop,
        step.is_last,
        params.min_tokens,
    )


def _width(step: CanvasStep) -> int:
    """Places that a request may hand out in the step: a block, or all if it answers once."""
    may, early = (step.host[_COLUMNS.index(name)] for name in ("may_hand_out", "early_stop"))
    length, num_tokens = (step.host[_COLUMNS.index(n)] for n in ("block_length", "num_tokens"))
    return int((may * np.where(early > 0, length, num_tokens)).max())


def _first(masked: Tensor) -> Tensor:
    """The first masked place of each row, or 0 if none is; int64 [rows]."""
    return masked.int().argmax(1)


def _signed(seed: int) -> int:
    """A seed of 64 bits as the int64 of the same bits."""
    seed &= (1 << 64) - 1
    return seed - (seed >> 63 << 64)
