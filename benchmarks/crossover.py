# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The length from which sparse steps are worth it, by device, from bench_generate.py's lines.

    python benchmarks/crossover.py

That is where dense by sparse seconds reach 1.1 for every model measured there, interpolated over
the logarithm of the length and rounded up to a power of two. sparsed_vllm/crossover.py holds what
this prints.
"""

import json
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

WORTH = 1.1  # seconds of a dense step by those of a sparse one
RESULTS = Path(__file__).parent / "results" / "generate.jsonl"
PHASES = ("dense", "sparse")

Steps = dict[int, dict[str, float]]  # tokens -> phase -> seconds


def read(path: Path = RESULTS) -> dict[tuple[str, str], Steps]:
    """Single requests' eager steps on each device and model; of repeated measurements the last."""
    steps: dict[tuple[str, str], Steps] = defaultdict(lambda: defaultdict(dict))
    for line in map(json.loads, path.read_text().splitlines()):
        is_single = line["engine"] == "eager" and line["batch"] == 1
        if is_single and line["phase"] in PHASES and "seconds" in line:
            steps[line["device"], line["model"]][line["tokens"]][line["phase"]] = line["seconds"]
    return steps


def crossover(steps: Steps) -> float:
    """Tokens; at least the shortest length measured, infinite if none is worth it."""
    gains = [(math.log2(n), at["dense"] / at["sparse"]) for n, at in sorted(steps.items())]
    if gains[0][1] >= WORTH:
        return 2 ** gains[0][0]
    for (short, less), (long, more) in pairwise(gains):
        if more >= WORTH:
            return 2 ** (short + (long - short) * (WORTH - less) / (more - less))
    return math.inf


def by_device() -> dict[str, float]:
    """Tokens by the device's name: the longest crossover among its models, rounded up."""
    longest: dict[str, float] = defaultdict(float)
    for (device, _), steps in read().items():
        longest[device] = max(longest[device], crossover(steps))
    return {device: 2.0 ** math.ceil(math.log2(tokens)) for device, tokens in longest.items()}


if __name__ == "__main__":
    for device, tokens in by_device().items():
        print(f"{device}: {tokens:.0f} tokens")
