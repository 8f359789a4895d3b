# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Means and how far to trust them: 95% intervals in which a question is the unit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.96


@dataclass(frozen=True)
class Mean:
    """value, and half the width of its interval."""

    value: float
    margin: float


def mean(values: Sequence[float]) -> Mean:
    """Of two values or more, by the normal approximation."""
    count = len(values)
    value = math.fsum(values) / count
    variance = math.fsum((x - value) ** 2 for x in values) / (count - 1)
    return Mean(value, Z * math.sqrt(variance / count))


def average(means: Sequence[Mean]) -> Mean:
    """Of independent means, each of the same weight."""
    value = math.fsum(x.value for x in means) / len(means)
    return Mean(value, math.sqrt(math.fsum(x.margin**2 for x in means)) / len(means))
