# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How long a sweep may take: what would not end in time is left out."""

import sys
import time
from collections.abc import Callable


class Budget:
    """Seconds that a sweep may take; None: any."""

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.now = seconds, now
        self.begin = now()
        self.last: tuple[float, float] | None = None  # work and seconds of what ran last

    def run(self, name: str, work: float, call: Callable[[], object]) -> None:
        """Call it, or say on stderr that it is left out.  work: in any unit, the same for all"""
        if not self.allows(work):
            note(f"left out, the budget would not last: {name}")
            return
        begin = self.now()
        call()
        self.last = (work, self.now() - begin)

    def allows(self, work: float) -> bool:
        """Would something of this size end in time? It takes as long as the last, or longer."""
        if self.seconds is None or self.last is None:
            return True
        last_work, last_seconds = self.last
        expected = last_seconds * max(1.0, work / last_work)
        return self.now() - self.begin + expected <= self.seconds


def note(text: str) -> None:
    """On stderr: what is printed are results."""
    print(text, file=sys.stderr, flush=True)
