# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Many short requests at once: tokens a second, and how busy the model's products are kept.

    python benchmarks/bench_throughput.py --modes dense reuse >> benchmarks/results/throughput.jsonl

Real shapes, dummy weights. `gemm_share`: seconds that the steps' matrix products take by
themselves, measured in the same run before and after, by the seconds that the steps take. Where
answers can be right or wrong, bench_decoding.py counts tokens a second.
"""

import argparse
import math
import time
from statistics import fmean
from typing import Any

from generation.dummies import MODELS, print_line, request, start
from generation.gemms import seconds_of_gemms
from generation.machine import forget_peak, wait
from vllm import LLM


def run(llm: LLM, args: argparse.Namespace, mode: str, steps: int) -> float:
    """Seconds from the first request to the last answer."""
    length = args.prompt + args.new_tokens
    for number in range(args.requests):
        prompt, params = request(length, args.new_tokens, steps, None)
        params.extra_args = {**params.extra_args, "block_length": args.block_length}
        if mode == "reuse":
            params.extra_args["kv_share"] = args.share
        llm.llm_engine.add_request(str(number), prompt, params)
    wait()
    begin = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    wait()
    return time.perf_counter() - begin


def light_rows(args: argparse.Namespace) -> int:
    """Tokens that light steps of all requests compute on average over their blocks."""
    first = range(0, args.new_tokens, args.block_length)
    rows = [args.new_tokens - n + math.ceil(args.share * (args.prompt + n)) for n in first]
    return round(args.requests * fmean(rows))


def open_rows(requests: int, new_tokens: int, steps: int) -> int:
    """Masked places that a step has on average: it fills as many as any other."""
    return round(requests * new_tokens * (steps + 1) / (2 * steps))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="llada")
    add("--requests", type=int, default=64)
    add("--prompt", type=int, default=512, help="tokens")
    add("--new-tokens", type=int, default=128)
    add("--steps", type=int, default=32)
    add("--block-length", type=int, help="places; left out, the canvas is one block")
    add("--modes", nargs="+", choices=["dense", "reuse"], default=["dense"])
    add("--share", type=float, default=0.02, help="kv_share of requests that reuse")
    add("--layers", type=int, help="fewer than the model has")
    add("--compiled", action="store_true", help="torch.compile and CUDA graphs, as vLLM has them")
    add("--no-async-scheduling", action="store_true", help="wait for a step before the next")
    args = parser.parse_args(argv)
    args.block_length = args.block_length or args.new_tokens
    blocks, rest = divmod(args.new_tokens, args.block_length)
    if rest or args.steps % blocks:
        parser.error(
            "--new-tokens must be blocks of --block-length, and --steps a multiple of them."
        )
    return args


def gemm_seconds(llm: LLM, args: argparse.Namespace, mode: str) -> float:
    """Of all steps of a run."""
    rows = open_rows(args.requests, args.new_tokens, args.steps)
    tokens = args.requests * (args.prompt + args.new_tokens)
    whole = seconds_of_gemms(llm, tokens, rows)
    if mode == "dense":
        return args.steps * whole
    return whole + (args.steps - 1) * seconds_of_gemms(llm, light_rows(args), rows)


def measure(llm: LLM, args: argparse.Namespace, mode: str) -> dict[str, Any]:
    run(llm, args, mode, 2 * args.new_tokens // args.block_length)  # compiles every kernel
    forget_peak()
    before = gemm_seconds(llm, args, mode)
    seconds = run(llm, args, mode, args.steps)
    gemms = (before + gemm_seconds(llm, args, mode)) / 2
    return {
        "mode": mode,
        "share": args.share if mode == "reuse" else None,
        "seconds": seconds,
        "seconds_a_step": seconds / args.steps,
        "gemm_seconds_a_step": gemms / args.steps,
        "gemm_share": gemms / seconds,
        "tokens_per_second": args.requests * args.new_tokens / seconds,
    }


def start_engine(args: argparse.Namespace) -> LLM:
    """Whose pages hold all requests at once."""
    length = args.prompt + args.new_tokens
    options: dict[str, Any] = {"enforce_eager": not args.compiled}
    options["async_scheduling"] = not args.no_async_scheduling
    if "reuse" in args.modes:
        options["additional_config"] = {"reuse": {"by_default": 0}}
    tokens = args.requests * length
    return start(args.model, args.layers, length, tokens, args.requests, **options)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    llm = start_engine(args)
    for mode in args.modes:
        print_line(
            "throughput",
            args.model,
            args.layers,
            engine="compiled" if args.compiled else "eager",
            async_scheduling=not args.no_async_scheduling,
            requests=args.requests,
            tokens=args.prompt + args.new_tokens,
            new_tokens=args.new_tokens,
            steps=args.steps,
            block_length=args.block_length,
            **measure(llm, args, mode),
        )


if __name__ == "__main__":
    main()
