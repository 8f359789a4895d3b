# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""One request's denoising, from its first step to its last, whatever runs the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsed_vllm.canvas import Canvas
from sparsed_vllm.config import Sparsity
from sparsed_vllm.kernels.choice import Forbidden
from sparsed_vllm.logprobs import LogprobRecord, TokenScores
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.phases import Phase, Schedule, phase_of, resume_step
from sparsed_vllm.unmasking import (
    choose_places,
    choose_tokens,
    draw_places,
    dream_shares,
    places_per_step,
)

_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # spreads (seed, step) over all seeds
_LARGEST_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class FinalTokens:
    """Tokens of a request that will not change any more.

    tokens int64 [width];  count int64 [], on the device: how many of them there are
    has_failed bool [], on the device: whether they, or what comes after them, are worth nothing
    scores: of the same width; None if the request did not ask
    """

    tokens: Tensor
    count: Tensor
    has_failed: Tensor
    scores: TokenScores | None = None


class Denoising:
    """The canvas of one request and the step it is at.

    Every step: `open_places` says which logits are needed, `advance` fills some of those places,
    `take_final` hands out the tokens that will not change any more. Nothing here waits for the
    device: what the host must know beforehand (how many places are open) follows from the
    schedule, exactly or, with a threshold or `origin`, as a bound.

    sparsity: how the request runs sparse; None: dense throughout
    tokens: the canvas as it stands, the mask token from `num_final` on
    num_final: places that are already final and handed out (a block boundary); 0 for a new
        request, more for one that resumes after preemption
    generator: on `device`; shared between requests, seeded anew by each step
    """

    def __init__(
        self,
        params: DenoisingParams,
        sparsity: Sparsity | None,
        tokens: Sequence[int],
        *,
        num_final: int,
        mask_token_id: int,
        seed: int,
        generator: torch.Generator,
    ) -> None:
        self.params = params
        self.sparsity = sparsity
        device = generator.device
        self._forbidden = Forbidden(
            mask_token_id,
            torch.tensor(params.stop_tokens, dtype=torch.int64).to(device, non_blocking=True),
        )
        self.schedule = Schedule.of(params)
        self.step = resume_step(self.schedule, num_final, sparsity is not None)
        num_filled = num_final if self.step else 0
        # The device may be at another request's step, and nobody waits for it here either.
        filled = torch.tensor(tokens[:num_filled], dtype=torch.int64)
        canvas = torch.full((len(tokens),), mask_token_id, device=device)
        canvas[:num_filled] = filled.to(device, non_blocking=True)
        self.canvas = Canvas(
            canvas, torch.arange(len(tokens), device=device) >= num_filled, params.block_length
        )
        self._record = None
        if params.logprobs is not None:
            self._record = LogprobRecord(len(tokens), params.logprobs, mask_token_id, device)
        self._has_failed = torch.zeros((), dtype=torch.bool, device=device)
        self.num_taken = torch.full((), num_final, device=device)
        self._seed = seed
        self._generator = generator
        self._pace_is_known = params.threshold is None and params.policy != "origin"
        self._counts = self._plan() if self._pace_is_known else []

    def _plan(self) -> list[int]:
        """[num_steps] places that each step fills."""
        blocks = self.schedule.blocks
        return [n for block in blocks for n in places_per_step(block, self.params)]

    @property
    def phase(self) -> Phase:
        """How the coming step attends."""
        if self.sparsity is None:
            return Phase.DENSE
        return phase_of(self.step, self.params.steps, self.sparsity.skip)

    @property
    def is_over(self) -> bool:
        """Whether all steps have run (those of a threshold may end sooner)."""
        return self.step >= self.schedule.num_steps

    def open_places(self) -> Tensor:
        """The places whose logits this step reads.

        Returns int64 [n], ascending, -1 beyond the last; n is known without asking the device.
        """
        return self.canvas.open_places(self._num_open(), self._end_of_open())

    def reach(self) -> range:
        """The places among which those of `open_places` are, as far as the host can tell."""
        if self.params.threshold is not None:
            # Each step so far has filled a place, block after block.
            first = min(self.step, self.params.num_tokens - 1)
            return range(first - first % self.params.block_length, self.params.num_tokens)
        block, _ = self.schedule.locate(min(self.step, self.schedule.num_steps - 1))
        return range(block.start, block.end)

    def _end_of_open(self) -> int | None:
        """Where the open places of this step end; None if the canvas knows it alone.

        `origin` may draw all places of a block before its last step. The steps that are left of
        it then fill nothing: the next block has steps of its own.
        """
        if self.params.policy != "origin" or self.params.threshold is not None or self.is_over:
            return None
        block, _ = self.schedule.locate(self.step)
        return block.end

    def _num_open(self) -> int:
        if self.is_over:
            return 0
        if not self._pace_is_known:
            # A threshold fills at least one place a step; `origin` may fill none.
            filled = self.step if self.params.threshold is not None else 0
            return min(self.params.block_length, self.params.num_tokens - filled)
        if self._counts[self.step] == 0:
            return 0
        block, step = self.schedule.locate(self.step)
        return block.size - sum(self._counts[self.step - step : self.step])

    def advance(self, places: Tensor, logits: Tensor) -> None:
        """Run one step.

        places: what `open_places` returned;  logits [len(places), vocab], any float type
        """
        if len(places):
            self._generator.manual_seed((self._seed + self.step * _GOLDEN_RATIO) & _LARGEST_SEED)
            tokens, confidence, largest = choose_tokens(
                logits, self.params, self._forbidden_at(places), self._generator
            )
            self._has_failed = self._has_failed | ~largest.isfinite().all()
            chosen = self._choose(places >= 0, confidence)
            self.canvas.fill(places, tokens, chosen)
            if self._record is not None:
                self._record.note(logits, places, tokens, self._rows_of(chosen))
        self.step += 1

    def _forbidden_at(self, places: Tensor) -> Forbidden:
        if not self.params.stop_tokens:
            return self._forbidden
        return replace(self._forbidden, early=places < self.params.min_tokens)

    def _choose(self, is_open: Tensor, confidence: Tensor) -> Tensor:
        """Which of the open places this step fills; bool like `is_open`."""
        if self.params.policy == "origin":
            block, step = self.schedule.locate(self.step)
            share = dream_shares(block.steps, self.params.eps)[step]
            return draw_places(is_open, share, self._generator)
        count = self._counts[self.step] if self._pace_is_known else 0
        confidence = confidence.masked_fill(~is_open, float("-inf"))
        return choose_places(confidence, count, self.params, self._generator)

    def _rows_of(self, chosen: Tensor) -> Tensor:
        """Which rows of bool `chosen` are True, as many as can be; -1 beyond the last."""
        most = self._counts[self.step] if self._pace_is_known else len(chosen)
        return torch.nonzero_static(chosen, size=most, fill_value=-1).squeeze(-1)

    def take_final(self) -> FinalTokens:
        """The tokens that became final and were not handed out yet."""
        if not self._may_finish_block():
            none = self.canvas.tokens[:0]
            return FinalTokens(none, torch.zeros_like(self.num_taken), self._has_failed)
        # A request that starts over does not hand out twice what it handed out before.
        num_final = torch.maximum(self._num_final(), self.num_taken)
        width = self.params.block_length if self.params.early_stop else self.params.num_tokens
        places = self.num_taken + torch.arange(width, device=num_final.device)
        places = places.clamp(max=self.canvas.num_tokens - 1)
        count = num_final - self.num_taken
        self.num_taken = num_final
        scores = self._record.of(places) if self._record is not None else None
        return FinalTokens(self.canvas.tokens[places], count, self._has_failed, scores)

    def _may_finish_block(self) -> bool:
        """Whether the step just run can have finished a block (without early stop: the canvas)."""
        if self.params.threshold is not None:
            return True
        return self.is_over or (self.params.early_stop and self.step in self.schedule.first_steps)

    def _num_final(self) -> Tensor:
        """How many places may have been handed out after the step just run; int64 []."""
        num_final, whole = self.canvas.num_final(), self.canvas.num_tokens
        if self.is_over:
            # Logits that are not numbers can leave a place unfilled; the request ends all the same.
            return torch.full_like(num_final, whole)
        return num_final if self.params.early_stop else num_final // whole * whole
