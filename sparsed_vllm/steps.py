# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What each step of a request does: the one plan that scheduler and worker both read."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from sparsed_vllm.config import Sparsity
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.reuse import Reuse


class Phase(Enum):
    """How one step attends."""

    DENSE = "dense"  # to everything
    RECORDING = "recording"  # to everything, and notes which key blocks matter
    SPARSE = "sparse"  # to the key blocks that were noted


class Source(Enum):
    """Where a step's keys and values come from."""

    FRESH = "fresh"  # all from this step's own projection
    PAGES = "pages"  # those of tokens that the step does not compute, from earlier steps


class Block(NamedTuple):
    """Places [start, end) of a canvas, denoised together in `steps` steps."""

    start: int
    end: int
    steps: int

    @property
    def size(self) -> int:
        return self.end - self.start


class Step(NamedTuple):
    """What one step of one request does.

    phase: how it attends;  source: where its keys and values come from
    num_rows: tokens that it computes: num_chosen of those before `first_row`, which the device
        chooses, and all from `first_row` of the sequence on
    block: the places it denoises; with a threshold only the device knows which block it is at, and
        this is the first that it may be
    end: no place from there on is open
    block_step: its number within the block, from 0; None: only the device knows
    num_open: places whose logits it reads; a bound where only the device knows
    num_filled: places that it fills; None: only the device knows
    share: probability with which it fills each open place (Dream's `origin`)
    may_hand_out: whether tokens may become final in it
    is_last: whether the request ends with it
    """

    phase: Phase
    source: Source
    first_row: int
    num_chosen: int
    num_rows: int
    block: Block
    end: int
    block_step: int | None
    num_open: int
    num_filled: int | None
    share: float
    may_hand_out: bool
    is_last: bool

    @property
    def length(self) -> int:
        """Tokens of the sequence: prompt and canvas, as far as it has grown."""
        return self.first_row + self.num_rows - self.num_chosen


@dataclass(frozen=True)
class Plan:
    """The steps of one request, from its parameters alone.

    sparsity: how it runs sparse; None: dense throughout
    prompt_len: tokens before its canvas
    reuse: how it reuses keys and values between steps; None: every step computes all tokens
    shift: 1 where place i is predicted by the hidden state of place i - 1, else 0
    """

    params: DenoisingParams
    sparsity: Sparsity | None
    prompt_len: int
    reuse: Reuse | None = None
    shift: int = 0

    @property
    def length(self) -> int:
        """Tokens of prompt and whole canvas."""
        return self.prompt_len + self.params.num_tokens

    def length_at(self, step: int) -> int:
        """Tokens of the sequence at a step."""
        if not self.params.variable_length:
            return self.length
        return self.prompt_len + self._block_at(step).end

    def _block_at(self, step: int) -> Block:
        return self.blocks[bisect_right(self.first_steps, step) - 1]

    @property
    def pace_is_known(self) -> bool:
        """Whether the host knows how many places each step fills."""
        return self.params.threshold is None and self.params.policy != "origin"

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """In the order they are denoised.

        With a threshold a step fills at least one place, so a block may take as many steps as it
        has places.
        """
        params = self.params
        starts = range(0, params.num_tokens, params.block_length)
        ends = [min(start + params.block_length, params.num_tokens) for start in starts]
        sizes = [end - start for start, end in zip(starts, ends, strict=True)]
        steps = sizes if params.threshold is not None else split_steps(params.steps, sizes)
        return tuple(map(Block, starts, ends, steps))

    @cached_property
    def first_steps(self) -> list[int]:
        """[num_blocks + 1] the step at which each block begins; last, the number of steps."""
        return list(accumulate((block.steps for block in self.blocks), initial=0))

    @property
    def num_steps(self) -> int:
        """The most steps that the request takes; those of a threshold may end sooner."""
        return self.first_steps[-1]

    @cached_property
    def recording_step(self) -> int | None:
        """The first step that records the table; None: there is none.

        With reuse the first, which computes all tokens anyway.
        """
        if self.sparsity is None:
            return None
        if self.reuse is not None:
            return 0 if self.num_steps > 1 else None
        step = recording_step(self.params.steps, self.sparsity.skip)
        return step if step < self.num_steps else None

    @cached_property
    def _filled(self) -> list[int]:
        """[num_steps + 1] places filled before each step, where the pace is known."""
        counts = (n for block in self.blocks for n in places_per_step(block, self.params))
        return list(accumulate(counts, initial=0))

    def at(self, step: int) -> Step:
        """What `step` in [0, num_steps) does."""
        index = bisect_right(self.first_steps, step) - 1
        block, block_step = self.blocks[index], step - self.first_steps[index]
        is_last = step + 1 == self.num_steps
        begin = (self.phase_of(step), *self.rows_at(step), block)
        if self.params.threshold is not None:
            # Each step so far has filled a place, block after block.
            most = min(self.params.block_length, self.params.num_tokens - step)
            return Step(*begin, self.params.num_tokens, None, most, None, 0.0, True, is_last)
        may_hand_out = is_last or (self.params.early_stop and block_step + 1 == block.steps)
        if not self.pace_is_known:
            share = dream_shares(block.steps, self.params.eps)[block_step]
            return Step(
                *begin, block.end, block_step, block.size, None, share, may_hand_out, is_last
            )
        filled = self._filled[step + 1] - self._filled[step]
        num_open = block.end - self._filled[step] if filled else 0
        return Step(*begin, block.end, block_step, num_open, filled, 0.0, may_hand_out, is_last)

    def rows_at(self, step: int) -> tuple[Source, int, int, int]:
        """Source, first_row, num_chosen and num_rows of a step.

        A light step computes the canvas from the block on that the step before worked at: its last
        places were filled after their keys and values had been computed.
        """
        reuse, length = self.reuse, self.length_at(step)
        is_whole = step == 0 or self.phase_of(step) is Phase.RECORDING
        if reuse is None or is_whole or (reuse.refresh and step % reuse.refresh == 0):
            return Source.FRESH, 0, 0, length
        first = self.prompt_len + self._block_at(step - 1).start - self.shift
        if self.sparsity is not None:
            first -= first % self.sparsity.tile  # rows of tables are of whole blocks
        chosen = math.ceil(reuse.share * first) if step % reuse.every == 0 else 0
        return Source.PAGES, first, chosen, length - first + chosen

    def phase_of(self, step: int) -> Phase:
        """How `step` attends."""
        if self.recording_step is None:
            return Phase.DENSE
        assert self.sparsity is not None
        return _phase_of(step, self.recording_step, self.sparsity.refresh)

    def resume_step(self, num_final: int) -> int:
        """The step at which the request starts or, after a preemption, goes on.

        num_final: places that were handed out before, a block boundary. A request that records a
        table, or reuses keys and values, starts over: these are lost with its pages, and were those
        of steps long past.
        """
        if self.sparsity is not None or self.reuse is not None:
            return 0
        return self.first_steps[sum(block.end <= num_final for block in self.blocks)]


class Cursor:
    """Where a request is in its plan. Scheduler and worker hold one each and move them alike.

    step: the number of its next step
    """

    def __init__(self, plan: Plan, num_final: int = 0) -> None:
        self.plan = plan
        self.restart(num_final)

    def restart(self, num_final: int) -> None:
        """It starts or, after a preemption, goes on; num_final: places handed out before."""
        self.step = self.plan.resume_step(num_final)
        self._upcoming: Step | None = None

    @property
    def steps_left(self) -> int:
        return self.plan.num_steps - self.step

    @property
    def upcoming(self) -> Step:
        """What the next step does; there must be one left."""
        if self._upcoming is None:
            self._upcoming = self.plan.at(self.step)
        return self._upcoming

    @property
    def chooses_next(self) -> bool:
        """Whether the next step computes tokens that the attention of the one before chooses."""
        reuse = self.plan.reuse
        if reuse is None or not reuse.by_attention or not self.steps_left:
            return False
        return self.upcoming.num_chosen > 0

    def advance(self) -> Step:
        """Take the next step, and return it; there must be one left."""
        step, self._upcoming = self.upcoming, None
        self.step += 1
        return step


def phase_of(step: int, num_steps: int, skip: float, refresh: int | None = None) -> Phase:
    """The phase of `step` of a request that runs sparse.

    num_steps: T of the paper;  skip: share of the steps before the table is recorded
    refresh: it is recorded again every so many steps; None: never, as published
    Source: SparseD, arXiv 2509.24014.
    """
    return _phase_of(step, recording_step(num_steps, skip), refresh)


def _phase_of(step: int, recording: int, refresh: int | None) -> Phase:
    """recording: the first step that records"""
    if step < recording:
        return Phase.DENSE
    is_due = step == recording or (refresh is not None and (step - recording) % refresh == 0)
    return Phase.RECORDING if is_due else Phase.SPARSE


def recording_step(num_steps: int, skip: float) -> int:
    """The step that records the table; at or after `num_steps` there is none.

    int() truncates the float product, as SparseD's authors have it.
    """
    return int(num_steps * skip) + 1


def split_steps(steps: int, sizes: list[int]) -> list[int]:
    """How many of `steps` each block gets: one, and more in proportion to its other places.

    Equal to steps // num_blocks, as the authors have it, where that divides evenly; one step a
    place where steps == sum(sizes). Needs steps >= len(sizes).
    """
    weights = [size - 1 for size in sizes]
    if not any(weights):
        weights = [1] * len(sizes)
    extra, total = steps - len(sizes), sum(weights)
    through = [math.ceil(extra * done / total) for done in accumulate(weights, initial=0)]
    return [1 + b - a for a, b in pairwise(through)]


def places_per_step(block: Block, params: DenoisingParams) -> list[int]:
    """[block.steps] how many places each step of `block` fills, where that is known beforehand.

    The rule of the family that `params.policy` belongs to; not for `origin` or a threshold.
    """
    if params.policy in ("low_confidence", "random"):
        return [even_share(block.size, block.steps, step) for step in range(block.steps)]
    left, counts = block.size, []
    for share in dream_shares(block.steps, params.eps):
        counts.append(int(np.float32(left) * np.float32(share)))
        left -= counts[-1]
    return counts


def even_share(places: int, steps: int, step: int) -> int:
    """Places filled at `step` when `places` are spread evenly, the remainder on the first steps.

    Source: get_num_transfer_tokens in ML-GSAI/LLaDA generate.py.
    """
    return places // steps + (step < places % steps)


# Few, as clients choose both, and the shares of 100,000 steps take 3 MiB.
@lru_cache(maxsize=32)
def dream_shares(steps: int, eps: float) -> tuple[float, ...]:
    """[steps] the share of the masked places that each step fills, 1 - s / t in float32.

    Source: _sample in DreamLM/Dream generation_utils.py; the last step fills what is left.
    """
    timesteps = torch.linspace(1, eps, steps + 1).numpy()
    shares: list[float] = (1 - timesteps[1:] / timesteps[:-1]).tolist()
    return (*shares[:-1], 1.0)
