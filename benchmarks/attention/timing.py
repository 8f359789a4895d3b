# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Kernels timed in turns."""

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


def spread(times: Sequence[float]) -> float:
    return max(times) - min(times)
