# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Whole generations, dense and sparse in one run, on the shapes of the real checkpoints.

    python benchmarks/bench_generate.py --model llada --lengths 16384 65536 >> generate.jsonl

A generation of T steps is some dense steps, one that records and many sparse ones, and all of a
phase cost the same. So one short request is timed step by step, and a line for each mode and T of
`--steps` adds the phases' medians up ("projected": true). `--whole` runs each generation to its end
instead. `--profile` adds, for a step of each phase, the shares of its time that attention, linears
and the rest take on the GPU, and the share in which the GPU waits.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from typing import Any

from dummies import MODELS, SELECT, SKIP, peak_bytes, request, start, versions, wait
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from vllm import LLM

from sparsed_vllm.phases import phase_of

SHORT = 7  # steps of a request that is timed step by step: 2 dense, 1 recording, 4 sparse
KINDS = {  # of kernels, by a part of their names; the first that fits counts
    "attention": ("attention", "flash", "block_scores", "select_blocks"),
    "linears": ("gemm", "cutlass", "nvjet", "cublas", "wgmma"),
    "norm, rotary, activation": ("norm", "rotary", "silu", "act_and_mul"),
    "sampler": ("softmax", "sort", "topk", "argmax", "scatter", "gather", "index"),
}

Phases = dict[str, list[float]]


def time_phases(llm: LLM, batch: int, length: int, new_tokens: int) -> Phases:
    """Seconds of every step, by phase; all requests of the batch are in the same phase."""
    add(llm, batch, length, new_tokens, SHORT, sparse=True)
    seconds = defaultdict(list)
    for step in range(SHORT):
        seconds[phase_of(step, SHORT, SKIP).value].append(time_step(llm))
    assert not llm.llm_engine.has_unfinished_requests()
    return seconds


def add(llm: LLM, batch: int, length: int, new_tokens: int, steps: int, *, sparse: bool) -> None:
    for number in range(batch):
        prompt, params = request(length, new_tokens, steps, sparse=sparse)
        llm.llm_engine.add_request(str(number), prompt, params)


def time_step(llm: LLM) -> float:
    """The engine reads a step's tokens before it returns: nothing is left on the device."""
    begin = time.perf_counter()
    llm.llm_engine.step()
    return time.perf_counter() - begin


def project(seconds: Phases, steps: int, *, sparse: bool) -> float:
    """Seconds of a generation, from what its phases cost a step."""
    medians = {phase: statistics.median(times) for phase, times in seconds.items()}
    if not sparse:
        return steps * medians["dense"]
    return sum(medians[phase_of(step, steps, SKIP).value] for step in range(steps))


def time_whole(
    llm: LLM, batch: int, length: int, new_tokens: int, steps: int, *, sparse: bool
) -> float:
    add(llm, batch, length, new_tokens, steps, sparse=sparse)
    begin = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return time.perf_counter() - begin


def profile_phases(
    llm: LLM, batch: int, length: int, new_tokens: int
) -> dict[str, dict[str, float]]:
    """For one step of each phase, the share of its time that each kind of kernel takes."""
    add(llm, batch, length, new_tokens, SHORT, sparse=True)
    shares = {}
    for step in range(SHORT):
        phase = phase_of(step, SHORT, SKIP).value
        if phase in shares or step == 0:
            time_step(llm)
            continue
        wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            seconds = time_step(llm)
        shares[phase] = kernel_shares(trace, seconds)
    return shares


def kernel_shares(trace: profile, seconds: float) -> dict[str, float]:
    micros: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        if event.device_type is DeviceType.CUDA:  # a kernel, not the operator that launched it
            micros[kind_of(event.key)] += event.self_device_time_total
    idle = max(0.0, seconds - sum(micros.values()) / 1e6)
    return {**{kind: us / 1e6 / seconds for kind, us in micros.items()}, "idle": idle / seconds}


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return "other"


def report(args: argparse.Namespace, length: int, new_tokens: int, batch: int, **rest: Any) -> None:
    line = {
        "bench": "generate",
        "model": args.model,
        **versions(),
        "tokens": length,
        "new_tokens": new_tokens,
        "batch": batch,
        "select": SELECT,
        "skip": SKIP,
        **rest,
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(line), flush=True)


def measure(llm: LLM, args: argparse.Namespace, length: int, new_tokens: int, batch: int) -> None:
    seconds = time_phases(llm, batch, length, new_tokens)
    for phase, times in seconds.items():
        step = {"seconds": statistics.median(times), "spread": max(times) - min(times)}
        report(args, length, new_tokens, batch, phase=phase, **step)
    for steps in args.steps:
        for mode in ("dense", "sparse"):
            if args.whole:
                total = time_whole(llm, batch, length, new_tokens, steps, sparse=mode == "sparse")
            else:
                total = project(seconds, steps, sparse=mode == "sparse")
            whole = {"phase": "generation", "mode": mode, "steps": steps, "seconds": total}
            rate = {"tokens_per_second": batch * new_tokens / total, "projected": not args.whole}
            report(args, length, new_tokens, batch, **whole, **rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="llada")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[128])
    parser.add_argument("--steps", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    llm = start(args.model, args.layers, max(args.lengths), max(args.batch))
    first = min(args.lengths)
    time_phases(llm, 1, first, args.new_tokens[0])  # compiles every kernel
    for length in sorted(args.lengths):
        for new_tokens in args.new_tokens:
            for batch in args.batch:
                measure(llm, args, length, new_tokens, batch)
                if args.profile:
                    for phase, shares in profile_phases(llm, batch, length, new_tokens).items():
                        report(args, length, new_tokens, batch, phase=phase, shares=shares)


if __name__ == "__main__":
    main()
