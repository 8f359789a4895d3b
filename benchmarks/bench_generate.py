# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Whole generations, dense and sparse in one run, on the shapes of the real checkpoints.

    python benchmarks/bench_generate.py --lengths 16384 65536 --profile >> generate.jsonl
    python benchmarks/bench_generate.py --lengths 65536 --tables 128x128:0.3:0.2 128x32:0.1:0.2

A generation of T steps is some dense steps, one that records and many sparse ones, and all of a
phase cost the same. So a short request is timed step by step, which gives a line for each phase,
and a line for each mode and T of `--steps` adds the phases' medians up ("projected": true).
`--whole` runs each of these to its end as well. `--profile` adds, for a step of each phase, shares
of its time: attention, linears, the rest of the model, head, sampler, scheduler, and the time in
which the GPU waits; `overhead` is all but the model's kernels. They are of a step under the
profiler, which slows the host; `outside` is the share outside of the model and its head in steps
that are not traced. `tokens` are prompt and canvas
together. On a CPU take --layers 1: all layers cost the same.
"""

import argparse
from functools import partial
from itertools import product
from typing import Any

import torch
from attention.timing import spread
from budget import Budget, note
from generation.dummies import MODELS, PUBLISHED, Tables, print_line, start
from generation.machine import forget_peak
from generation.shares import profile_phases
from generation.steps import Load, medians, project, time_phases, time_whole

MODES = ("dense", "sparse")


class Bench:
    """One engine, and what its lines have in common."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        options: dict[str, Any] = {"enforce_eager": not args.compiled}
        self.llm = start(
            args.model, args.layers, max(args.lengths), args.tokens, max(args.batch), **options
        )

    def report(self, load: Load, phase: str, **rest: Any) -> None:
        common = {
            "engine": "compiled" if self.args.compiled else "eager",
            **load.sizes,
            "cache_bytes": self.llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes,
            "phase": phase,
        }
        print_line("generate", self.args.model, self.args.layers, **common, **rest)

    def measure(self, load: Load) -> None:
        forget_peak()
        times = time_phases(self.llm, load)
        seconds = medians(times)
        for phase in times:
            numbers = {"spread": spread(times[phase]), "count": len(times[phase])}
            self.report(load, phase, seconds=seconds[phase], **numbers)
        for steps, mode in product(self.args.steps, MODES):
            self.generation(load, mode, steps, seconds)
        if self.args.profile and not torch.cuda.is_available():
            note("not profiled: shares are those of a GPU's time, and there is none here")
        elif self.args.profile:
            for phase, shares in profile_phases(self.llm, load).items():
                self.report(load, phase, shares=shares)

    def generation(self, load: Load, mode: str, steps: int, phases: dict[str, float]) -> None:
        sparse = mode == "sparse"
        totals = [(project(phases, steps, load.tables.skip if sparse else None), True)]
        if self.args.whole:
            totals.append((time_whole(self.llm, load, steps, sparse=sparse), False))
        for total, projected in totals:
            rate = load.batch * load.new_tokens / total
            numbers = {"seconds": total, "tokens_per_second": rate, "projected": projected}
            self.report(load, "generation", mode=mode, steps=steps, **numbers)


def loads(args: argparse.Namespace) -> list[Load]:
    """What is measured, short requests first; what cannot be is named."""
    found = []
    sizes = (sorted(args.lengths), args.new_tokens, args.batch, args.tables)
    for length, new_tokens, batch, tables in product(*sizes):
        load = Load(length, new_tokens, batch, tables)
        if new_tokens >= length:
            note(f"left out: {new_tokens} new tokens leave no prompt in {length}")
        elif load.tokens > args.tokens:
            note(f"left out: {batch} requests of {length} tokens are over --tokens {args.tokens}")
        else:
            found.append(load)
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="llada")
    add("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    add("--new-tokens", type=int, nargs="+", default=[128])
    add("--steps", type=int, nargs="+", default=[128, 1024], help="T of a generation")
    add("--batch", type=int, nargs="+", default=[1], help="requests at once, where they fit")
    add("--tokens", type=int, help="tokens at once; by default those of the longest request")
    add("--tables", type=Tables.of, nargs="+", default=[PUBLISHED], help="QUERIESxKEYS:SELECT:SKIP")
    add("--layers", type=int, help="fewer than the model has")
    add("--compiled", action="store_true", help="torch.compile and CUDA graphs, as vLLM has them")
    add("--whole", action="store_true", help="run each generation to its end as well")
    add("--profile", action="store_true")
    add("--budget", type=float, help="seconds, without the engine's start")
    args = parser.parse_args(argv)
    args.tokens = args.tokens or max(args.lengths)
    if args.tokens < max(args.lengths):
        parser.error(f"--tokens must be at least {max(args.lengths)}, got {args.tokens}.")
    return args


def main() -> None:
    args = parse()
    bench, planned, budget = Bench(args), loads(args), Budget(args.budget)
    for tables in args.tables:
        first = next((load for load in planned if load.tables == tables), None)
        if first is not None:
            time_phases(bench.llm, first)  # compiles the kernels of such blocks
    for load in planned:
        budget.run(str(load), load.work, partial(bench.measure, load))


if __name__ == "__main__":
    main()
