# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Seconds a denoising step, by phase, through vLLM's engine on the shapes of the real checkpoints.

    python benchmarks/bench_steps.py --model llada --lengths 4096 16384 >> results/steps.jsonl

Dense and sparse steps of one request lie in one run: T steps, of which the first int(T * 0.2) + 1
are dense, one records, the rest are sparse. A short request runs first, uncounted, to compile. One
JSON line for each length and phase. On a CPU take --layers 1: what matters there is how the phases
compare, and all layers cost the same.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict

from dummies import MODELS, SELECT, SKIP, peak_bytes, request, start, versions, wait
from vllm import LLM

from sparsed_vllm.phases import phase_of

NEW_TOKENS, STEPS = 128, 12
WARM_UP_TOKENS = 4096


def time_steps(llm: LLM, length: int, block_size: int) -> dict[str, list[float]]:
    """Seconds of each step of one request of `length` tokens, by phase."""
    prompt, params = request(length, NEW_TOKENS, STEPS, sparse=True, block_size=block_size)
    llm.llm_engine.add_request("0", prompt, params)
    seconds = defaultdict(list)
    for step in range(STEPS):
        wait()
        begin = time.perf_counter()
        llm.llm_engine.step()
        wait()
        seconds[phase_of(step, STEPS, SKIP).value].append(time.perf_counter() - begin)
    assert not llm.llm_engine.has_unfinished_requests()
    return seconds


def report(model: str, length: int, block_size: int, seconds: dict[str, list[float]]) -> None:
    for phase, times in seconds.items():
        line = {
            "bench": "steps",
            "model": model,
            **versions(),
            "tokens": length,
            "new_tokens": NEW_TOKENS,
            "steps": STEPS,
            "batch": 1,
            "select": SELECT,
            "block_size": block_size,
            "phase": phase,
            "seconds": statistics.median(times),
            "spread": max(times) - min(times),
            "count": len(times),
            "peak_bytes": peak_bytes(),
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="llada")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    args = parser.parse_args()
    llm = start(args.model, args.layers, max(args.lengths))
    time_steps(llm, min(WARM_UP_TOKENS, *args.lengths), args.block_size)  # compiles every kernel
    for length in sorted(args.lengths):
        report(args.model, length, args.block_size, time_steps(llm, length, args.block_size))


if __name__ == "__main__":
    main()
