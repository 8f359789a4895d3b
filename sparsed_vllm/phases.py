# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How a request's steps are split over its blocks, and how many places each step fills."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from sparsed_vllm.params import DenoisingParams


class Phase(Enum):
    """How one step attends."""

    DENSE = "dense"  # to everything
    RECORDING = "recording"  # to everything, and notes which key blocks matter
    SPARSE = "sparse"  # to the key blocks that were noted


def phase_of(step: int, num_steps: int, skip: float) -> Phase:
    """The phase of `step` of a request that runs sparse.

    num_steps: T of the paper;  skip: share of the steps before the pattern is recorded
    Source: SparseD, arXiv 2509.24014; int() truncates the float product, as the authors have it.
    """
    recording = recording_step(num_steps, skip)
    if step == recording:
        return Phase.RECORDING
    return Phase.DENSE if step < recording else Phase.SPARSE


def recording_step(num_steps: int, skip: float) -> int:
    """The step that records the pattern; at or after `num_steps` there is none."""
    return int(num_steps * skip) + 1


@dataclass(frozen=True)
class Block:
    """Places [start, end) of a canvas, denoised together in `steps` steps."""

    start: int
    end: int
    steps: int

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Schedule:
    """The blocks of one request in the order they are denoised."""

    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, params: DenoisingParams) -> "Schedule":
        """The schedule that `params` asks for.

        With a threshold the pace is not known beforehand: a step fills at least one place, so
        a block may take as many steps as it has places.
        """
        starts = range(0, params.num_tokens, params.block_length)
        ends = [min(start + params.block_length, params.num_tokens) for start in starts]
        sizes = [end - start for start, end in zip(starts, ends, strict=True)]
        steps = sizes if params.threshold is not None else split_steps(params.steps, sizes)
        return cls(tuple(map(Block, starts, ends, steps)))

    @cached_property
    def first_steps(self) -> list[int]:
        """[num_blocks + 1] the step at which each block begins; last, the number of steps."""
        firsts = [0]
        for block in self.blocks:
            firsts.append(firsts[-1] + block.steps)
        return firsts

    @property
    def num_steps(self) -> int:
        return self.first_steps[-1]

    def locate(self, step: int) -> tuple[Block, int]:
        """The block that `step` works on, and the number of the step within it."""
        index = bisect_right(self.first_steps, step) - 1
        return self.blocks[index], step - self.first_steps[index]

    def first_step_after(self, num_final: int) -> int:
        """The step at which work goes on once the first `num_final` places are final.

        num_final: a block boundary.
        """
        done = sum(block.end <= num_final for block in self.blocks)
        return self.first_steps[done]


def resume_step(schedule: Schedule, num_final: int, is_sparse: bool) -> int:
    """The step at which a request starts or, after a preemption, goes on.

    num_final: places that were handed out before. A sparse request starts over: its pattern is
    lost with its pages, and was that of a step long past.
    """
    return 0 if is_sparse else schedule.first_step_after(num_final)


def split_steps(steps: int, sizes: list[int]) -> list[int]:
    """How many of `steps` each block gets: one, and more in proportion to its other places.

    Equal to steps // num_blocks, as the authors have it, where that divides evenly; one step a
    place where steps == sum(sizes). Needs steps >= len(sizes).
    """
    weights = [size - 1 for size in sizes]
    if not any(weights):
        weights = [1] * len(sizes)
    extra, total = steps - len(sizes), sum(weights)
    through = [math.ceil(extra * done / total) for done in _running_sums(weights)]
    return [1 + b - a for a, b in zip([0, *through[:-1]], through, strict=True)]


def _running_sums(values: list[int]) -> Iterator[int]:
    total = 0
    for value in values:
        total += value
        yield total


def even_share(places: int, steps: int, step: int) -> int:
    """Places filled at `step` when `places` are spread evenly, the remainder on the first steps.

    Source: get_num_transfer_tokens in ML-GSAI/LLaDA generate.py.
    """
    return places // steps + (step < places % steps)
