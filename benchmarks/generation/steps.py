# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Seconds of an engine's steps, by phase, and what generations of any number of steps take."""

import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from vllm import LLM

from generation.dummies import PUBLISHED, Tables, request
from sparsed_vllm.steps import phase_of

SHORT = {16384: 12, 1 << 62: 7}
"""Steps of a request that is timed step by step, by the tokens up to which a step takes so many.

12 have 3 dense, 1 recording and 8 sparse ones; 7 have 2, 1 and 4.
"""

Phases = dict[str, list[float]]  # seconds of each step, by phase


@dataclass(frozen=True)
class Load:
    """Equal requests that run at once.  length: tokens of prompt and canvas together"""

    length: int
    new_tokens: int
    batch: int = 1
    tables: Tables = PUBLISHED

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def sizes(self) -> dict[str, Any]:
        """What lines say of it."""
        return {
            "tokens": self.length,
            "new_tokens": self.new_tokens,
            "batch": self.batch,
            **asdict(self.tables),
        }

    @property
    def work(self) -> float:
        """In the ratio of a dense step's time: attention takes as long as all else at 26600."""
        return self.tokens * (self.length + 26600.0)

    @property
    def short(self) -> int:
        """Steps of a short request, in which every phase occurs."""
        return next(steps for tokens, steps in SHORT.items() if self.tokens <= tokens)

    def phase_at(self, step: int) -> str:
        """Of a step of the short request."""
        return phase_of(step, self.short, self.tables.skip).value

    def add(self, llm: LLM, steps: int, *, sparse: bool) -> None:
        for number in range(self.batch):
            sizes = (self.length, self.new_tokens, steps)
            prompt, params = request(*sizes, self.tables if sparse else None)
            llm.llm_engine.add_request(str(number), prompt, params)


def time_phases(llm: LLM, load: Load) -> Phases:
    """All requests of the batch are in the same phase; an engine without async scheduling."""
    load.add(llm, load.short, sparse=True)
    seconds: Phases = defaultdict(list)
    for step in range(load.short):
        seconds[load.phase_at(step)].append(time_step(llm))
    assert not llm.llm_engine.has_unfinished_requests()
    return dict(seconds)


def time_step(llm: LLM) -> float:
    """The engine reads a step's tokens before it returns: nothing is left on the device."""
    begin = time.perf_counter()
    llm.llm_engine.step()
    return time.perf_counter() - begin


def time_whole(llm: LLM, load: Load, steps: int, *, sparse: bool) -> float:
    load.add(llm, steps, sparse=sparse)
    begin = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return time.perf_counter() - begin


def project(seconds: dict[str, float], steps: int, skip: float | None) -> float:
    """Seconds of a generation, from what a step of each phase takes.  skip: None: all are dense"""
    if skip is None:
        return steps * seconds["dense"]
    return sum(seconds[phase_of(step, steps, skip).value] for step in range(steps))


def medians(seconds: Phases) -> dict[str, float]:
    return {phase: statistics.median(times) for phase, times in seconds.items()}
