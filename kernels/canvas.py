# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The canvases of all requests as the kernels see them, and what one step does with some."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

(
    SLOT,
    NUM_TOKENS,
    NUM_SEEN,
    BLOCK_LENGTH,
    END,
    BLOCK_STEP,
    NUM_OPEN,
    ROW_START,
    NUM_FILLED,
    THRESHOLD,
    SHARE,
    ALG_TEMP,
    BY_CHANCE,
    MAY_HAND_OUT,
    EARLY_STOP,
    IS_LAST,
    MIN_TOKENS,
    FIRST_PLACE,
    CANVAS_ROW,
    READ_ROW,
    WINDOW_ROW,
) = range(21)
"""The columns of a step, one number a request:

SLOT: its row in the tensors of CanvasState
NUM_TOKENS, BLOCK_LENGTH: places of its canvas and of a block
NUM_SEEN: places of its canvas that the model sees, from the first
END: no place from there on is open
BLOCK_STEP: the step's number within its block; -1: only the device knows
NUM_OPEN, ROW_START: how many rows it reads, and where they begin among those of all requests
NUM_FILLED: places to fill by rank
THRESHOLD: confidence from which places are filled besides; infinity: none
SHARE: probability with which each open place is filled besides
ALG_TEMP: temperature of the draw of places, at least 1e-300; 0: none are drawn by it
BY_CHANCE: whether chance stands in for confidence
MAY_HAND_OUT: whether tokens may become final in the step
EARLY_STOP: whether they do so block by block
IS_LAST: whether the request ends with the step
MIN_TOKENS: places before which the text may not end
FIRST_PLACE: from which on its places are computed
CANVAS_ROW: the batch's row of its first place, or where that would be
READ_ROW: the batch's row that predicts its first place, or where that would be
WINDOW_ROW: the first of its rows in the batch that the last layer computes
"""
NUM_COLUMNS = 21


@dataclass(eq=False)
class CanvasState:
    """The canvases, preallocated by vLLM's slot, as vLLM keeps its own request states.

    tokens int32 [num_slots + 1, longest]: of each place; of a masked one that was handed out, the
        token that it will be filled with again, else undefined. What the last row holds is
        undefined.
    masked bool, of the same shape: the record of what is masked; never inferred from the token
    num_taken int64 [num_slots]: places handed out
    block_steps int64 [num_slots]: steps that the current block has had
    seeds int64 [num_slots];  has_failed bool [num_slots]: whether its logits were no numbers
    """

    tokens: Tensor
    masked: Tensor
    num_taken: Tensor
    block_steps: Tensor
    seeds: Tensor
    has_failed: Tensor

    @property
    def longest(self) -> int:
        """Places of the longest canvas."""
        return self.tokens.shape[1]


@dataclass(frozen=True)
class StepColumns:
    """What the requests' plans say of a step, in batch order.

    float64, which holds counts and probabilities alike, so that one copy sends all of them.

    host float64 [NUM_COLUMNS, num_reqs];  device: the same there
    """

    host: NDArray[np.float64]
    device: Tensor

    @property
    def num_reqs(self) -> int:
        return self.host.shape[1]

    @cached_property
    def num_rows(self) -> int:
        """Rows that the step reads."""
        return int(self.host[NUM_OPEN].sum())

    @cached_property
    def width(self) -> int:
        """Places that a request may hand out: a block, or all of them if it answers once."""
        of_one = np.where(self.host[EARLY_STOP] > 0, self.host[BLOCK_LENGTH], self.host[NUM_TOKENS])
        return int((self.host[MAY_HAND_OUT] * of_one).max())

    def most(self, column: int) -> int:
        """The largest number of a column."""
        return int(self.host[column].max())

    def count(self, column: int) -> Tensor:
        """A column of whole numbers, int64 [num_reqs] on the device."""
        return self.device[column].long()


class OpenRows(NamedTuple):
    """The rows whose logits a step reads, request by request; int64 [num_rows] each.

    places: the masked places of its request's first unfinished block, ascending; -1 for padding
    reqs: whose they are, in batch order
    batch_rows: the batch's rows that predict them
    seeds: of their requests;  block_steps: the step's number within their blocks
    """

    places: Tensor
    reqs: Tensor
    batch_rows: Tensor
    seeds: Tensor
    block_steps: Tensor


class Taken(NamedTuple):
    """What the requests of a batch hand out.

    tokens int64 [num_reqs, width];  places int64 [num_reqs, width]: where they stand
    counts int32 [num_reqs]: how many of each request's count
    has_failed int32 [num_reqs]: whether its logits were no numbers
    """

    tokens: Tensor
    places: Tensor
    counts: Tensor
    has_failed: Tensor


class SequenceRows(NamedTuple):
    """Rows of a batch that are of any places of their sequences, in no order.

    rows, places, seqs int64 [n]: of the batch, in their sequences, and whose, in batch order
    prompts int32 [num_slots, longest];  prompt_lens int32 [num_slots]
    positions int64 [rows of the batch]: written: what the model takes as the rows' places
    """

    rows: Tensor
    places: Tensor
    seqs: Tensor
    prompts: Tensor
    prompt_lens: Tensor
    positions: Tensor


class SequenceEnds(NamedTuple):
    """Where vLLM appends what is handed out.

    prompt_lens int32 [num_slots];  ends int32 [num_slots]: written
    """

    prompt_lens: Tensor
    ends: Tensor
