# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Kernels timed in turns, and how long all of it may take."""

import time
from collections.abc import Callable, Sequence

import torch

Clock = Callable[[Callable[[], object], int], float]  # (call, repeats) -> milliseconds a call


def milliseconds(call: Callable[[], object], repeat: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeat


def measure(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Clock = milliseconds
) -> dict[str, list[float]]:
    """Each call's milliseconds in each round; short ones are repeated within a round.

    Rounds begin with different calls, so that a hot card is hot for all.
    """
    names = list(calls)
    repeat = {name: min(20, int(4 / clock(call, 2)) + 1) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn * len(names) // rounds
        for name in names[first:] + names[:first]:
            times[name].append(clock(calls[name], repeat[name]))
    return times


class Budget:
    """Seconds that a sweep may take; None: any."""

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.now = seconds, now
        self.begin = now()
        self.last: tuple[float, float] | None = None  # work and seconds of what ran last

    def allows(self, work: float) -> bool:
        """Would something of this size end in time? It takes as long as the last, or longer.

        work: in any unit, the same for all
        """
        if self.seconds is None or self.last is None:
            return True
        last_work, last_seconds = self.last
        expected = last_seconds * max(1.0, work / last_work)
        return self.now() - self.begin + expected <= self.seconds

    def run(self, work: float, call: Callable[[], object]) -> None:
        begin = self.now()
        call()
        self.last = (work, self.now() - begin)


def spread(times: Sequence[float]) -> float:
    return max(times) - min(times)
