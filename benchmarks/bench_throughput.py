# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Many short requests at once: tokens a second, and how busy the model's products are kept.

    python benchmarks/bench_throughput.py >> benchmarks/results/throughput.jsonl

`gemm_share`: seconds that a step's matrix products take by themselves, measured in the same run
before and after, by the seconds that a step takes.
"""

import argparse
import time

from generation.dummies import MODELS, print_line, request, start
from generation.gemms import seconds_of_gemms
from generation.machine import forget_peak
from vllm import LLM


def run(llm: LLM, args: argparse.Namespace) -> float:
    """Seconds from the first request to the last answer."""
    length = args.prompt + args.new_tokens
    for number in range(args.requests):
        prompt, params = request(length, args.new_tokens, args.steps, sparse=False)
        llm.llm_engine.add_request(str(number), prompt, params)
    begin = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return time.perf_counter() - begin


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
    add("--layers", type=int, help="fewer than the model has")
    add("--compiled", action="store_true", help="torch.compile and CUDA graphs, as vLLM has them")
    add("--no-async-scheduling", action="store_true", help="wait for a step before the next")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    length = args.prompt + args.new_tokens
    tokens = args.requests * length
    llm = start(
        args.model,
        args.layers,
        length,
        tokens,
        args.requests,
        enforce_eager=not args.compiled,
        async_scheduling=not args.no_async_scheduling,
    )
    rows = open_rows(args.requests, args.new_tokens, args.steps)
    run(llm, argparse.Namespace(**{**vars(args), "steps": 2}))  # compiles every kernel
    forget_peak()
    before = seconds_of_gemms(llm, tokens, rows)
    seconds = run(llm, args)
    gemms = (before + seconds_of_gemms(llm, tokens, rows)) / 2
    print_line(
        "throughput",
        args.model,
        args.layers,
        engine="compiled" if args.compiled else "eager",
        async_scheduling=not args.no_async_scheduling,
        requests=args.requests,
        tokens=length,
        new_tokens=args.new_tokens,
        steps=args.steps,
        seconds=seconds,
        seconds_a_step=seconds / args.steps,
        gemm_seconds_a_step=gemms,
        gemm_share=gemms * args.steps / seconds,
        tokens_per_second=args.requests * args.new_tokens / seconds,
    )


if __name__ == "__main__":
    main()
