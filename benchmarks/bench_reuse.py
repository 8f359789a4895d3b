# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Seconds of a generation that reuses keys and values, beside exact ones, in one run.

    python benchmarks/bench_reuse.py --lengths 1024 8192 32768 65536

Real shapes, dummy weights. Generations with reuse are run whole; exact ones are added up from a few
of their steps (`projected`). `mode`: dense, sparse (SparseD), reuse (light steps attend to all
pages), reuse+sparse (to their tables' lists).
"""

import argparse
import time
from typing import Any

from generation.dummies import MODELS, PUBLISHED, SKIP, print_line, request, start
from generation.machine import wait

from sparsed_vllm.steps import recording_step


def add(llm: Any, args: argparse.Namespace, length: int, steps: int, **extra: Any) -> None:
    """Equal requests."""
    for i in range(args.batch):
        tables = PUBLISHED if extra["use_sparsed"] else None
        prompt, params = request(length, args.new_tokens, steps, tables)
        params.extra_args = {**params.extra_args, **extra}
        llm.llm_engine.add_request(str(i), prompt, params)


def time_steps(
    llm: Any, args: argparse.Namespace, length: int, steps: int, **extra: Any
) -> list[float]:
    """Seconds of each step of equal requests, one waited for before the next."""
    add(llm, args, length, steps, **extra)
    seconds = []
    while llm.llm_engine.has_unfinished_requests():
        wait()
        begin = time.perf_counter()
        llm.llm_engine.step()
        wait()
        seconds.append(time.perf_counter() - begin)
    return seconds


def time_whole(llm: Any, args: argparse.Namespace, length: int, steps: int, **extra: Any) -> float:
    """Seconds of whole generations of so many steps, as they are served."""
    add(llm, args, length, steps, **extra)
    wait()
    begin = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    wait()
    return time.perf_counter() - begin


def project(llm: Any, args: argparse.Namespace, length: int, sparse: int) -> float:
    """Seconds of an exact generation, from short ones: further steps of one kind take as much."""

    def took(steps: int, **extra: Any) -> float:
        return time_whole(llm, args, length, steps, use_sparsed=sparse, **extra)

    if not sparse:
        return (took(4) - took(2)) / 2 * args.steps
    dense = (took(4, sparsed_skip=1.0) - took(2, sparsed_skip=1.0)) / 2
    first_two = took(2, sparsed_skip=0.0)  # dense, recording
    follow = (took(8, sparsed_skip=0.0) - first_two) / 6
    whole = recording_step(args.steps, SKIP)
    return dense * (whole - 1) + first_two + follow * (args.steps - whole - 1)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="llada")
    add("--lengths", type=int, nargs="+", default=[1024, 8192, 32768, 65536])
    add("--new-tokens", type=int, default=128)
    add("--steps", type=int, default=128)
    add("--batch", type=int, default=1)
    add("--shares", type=float, nargs="+", default=[0.02])
    add("--every", type=int, default=2, help="in which steps prompt tokens are computed")
    add("--layers", type=int, help="fewer than the model has")
    add("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    add("--modes", nargs="+", default=["dense", "sparse", "reuse", "reuse+sparse"])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    longest = max(args.lengths)
    options: dict[str, Any] = {"additional_config": {"reuse": {"by_default": 0}}}
    options |= {"enforce_eager": args.eager, "async_scheduling": True}
    if not args.eager:
        # As with vLLM's own number of seats; with few it captures graphs for fewer tokens.
        options["compilation_config"] = {"max_cudagraph_capture_size": 512}
    tokens = args.batch * longest
    llm = start(args.model, args.layers, longest, tokens, args.batch, **options)
    for length in args.lengths:
        for mode in args.modes:
            sparse = int("sparse" in mode)
            for share in args.shares if "reuse" in mode else [None]:
                line = measure(llm, args, length, sparse, share)
                sizes = {"tokens": length, "new_tokens": args.new_tokens, "steps": args.steps}
                every = None if share is None else args.every
                sizes |= {"batch": args.batch, "share": share, "every": every}
                print_line("generate_reuse", args.model, args.layers, mode=mode, **sizes, **line)


def measure(
    llm: Any, args: argparse.Namespace, length: int, sparse: int, share: float | None
) -> dict[str, Any]:
    if share is not None:
        extra = {"use_sparsed": sparse, "kv_share": share, "kv_every": args.every}
        steps = time_steps(llm, args, length, 8, **extra)  # compiles kernels, too
        seconds = time_whole(llm, args, length, args.steps, **extra)
        light = [round(second, 5) for second in steps[1:-1]]  # one waited for before the next
        return {"engine": "ours", "seconds": seconds, "projected": False, "light_steps": light}
    time_steps(llm, args, min(length, 4096), 7, use_sparsed=sparse)  # compiles kernels
    seconds = project(llm, args, length, sparse)
    return {"engine": "ours", "seconds": seconds, "projected": True}


if __name__ == "__main__":
    main()
