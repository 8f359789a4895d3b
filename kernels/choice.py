# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How a token is chosen from a row of logits, and which tokens are out of the question."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Literal

from torch import Tensor

Confidence = Literal["probability", "margin", "entropy"]

STREAM = 1
"""Last word of the counters of a token's noise; a row's own uniform number has the next one.

torch's generator on a GPU is Philox too, and has 0 there.
"""


@dataclass(frozen=True)
class Choice:
    """What is drawn, and what is called confidence.

    temperature: 0: the likeliest allowed token; else a draw from softmax(logits / temperature)
    tempered: whether the confidence is of the distribution that is drawn from, without forbidden
        tokens, or of softmax(logits), where they count. Needs a temperature.
    top_p in (0, 1], top_k (0: all): drawn are tokens above which there is no more mass than top_p,
        and of them the top_k likeliest; tokens that tie are kept or left together. Need `tempered`.
    confidence: the chosen token's probability, the lead of the likeliest token's probability over
        the second's, or the entropy, negated
    """

    temperature: float = 0.0
    tempered: bool = False
    top_p: float = 1.0
    top_k: int = 0
    confidence: Confidence = "probability"

    def __post_init__(self) -> None:
        assert self.temperature > 0 or not self.tempered
        assert self.tempered or not self.truncates

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True)
class Forbidden:
    """Tokens that places may not take.

    mask_token_id: taken nowhere
    stop_tokens int64 [n]: not taken by the rows in `early`; None with it
    early bool [rows]: places at which the text may not end yet; None: there are none
    """

    mask_token_id: int
    stop_tokens: Tensor | None = None
    early: Tensor | None = None

    def of_rows(self, num_rows: int) -> Iterator["Forbidden"]:
        """The same for each `num_rows` rows, in order; without end if no row is early."""
        if self.early is None:
            return repeat(self)
        return (replace(self, early=early) for early in self.early.split(num_rows))

    def bar_from(self, scores: Tensor) -> Tensor:
        """Put these tokens out of reach in `scores` [rows, vocab], which it writes and returns."""
        scores[:, self.mask_token_id] = float("-inf")
        if self.early is not None:
            barred = scores[:, self.stop_tokens].masked_fill(self.early[:, None], float("-inf"))
            scores[:, self.stop_tokens] = barred
        return scores


@dataclass(frozen=True)
class Noise:
    """What the draws of some rows depend on, and nothing else does; int64 [rows] each.

    A place's draw is keyed by its request's seed, the place, and the step within its block, so
    that neither batch mates nor a preemption change it.

    seeds: of the rows' requests, any 64 bits
    places: in their canvases
    steps: of their blocks, from 0 when the block's first step runs
    """

    seeds: Tensor
    places: Tensor
    steps: Tensor

    def of(self, rows: slice) -> "Noise":
        """The same for some of the rows."""
        return Noise(self.seeds[rows], self.places[rows], self.steps[rows])

    def of_rows(self, num_rows: int) -> Iterator["Noise"]:
        """The same for each `num_rows` rows, in order."""
        parts = (x.split(num_rows) for x in (self.seeds, self.places, self.steps))
        return (Noise(*part) for part in zip(*parts, strict=True))
