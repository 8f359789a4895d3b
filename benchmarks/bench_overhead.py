# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How long the GPU is busy with other than the model, as the engine is served.

    python benchmarks/bench_overhead.py --lengths 1024 4096 16384
    python benchmarks/bench_overhead.py --lengths 1024 4096 16384 --no-async-scheduling

The device's own clock tells, without a profiler: `seconds` from the beginning of one step's model
to that of the next, and `outside`, the share of them that comes after the step's head.
"""

import argparse
import json
from typing import Any

import torch
from generation.dummies import MODELS, start, versions
from generation.shares import outside_model
from generation.steps import Load


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="llada")
    add("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    add("--new-tokens", type=int, default=128)
    add("--batch", type=int, default=1)
    add("--layers", type=int, help="fewer than the model has")
    add("--compiled", action="store_true", help="torch.compile and CUDA graphs, as vLLM has them")
    add("--no-async-scheduling", action="store_true", help="wait for a step before the next")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench_overhead.py needs a GPU: its clock is what measures.")
    longest = max(args.lengths)
    is_async = not args.no_async_scheduling
    options: dict[str, Any] = {"enforce_eager": not args.compiled, "async_scheduling": is_async}
    if args.compiled:
        # As with vLLM's own number of seats; with few it captures graphs for fewer tokens.
        options["compilation_config"] = {"max_cudagraph_capture_size": 512}
    llm = start(args.model, args.layers, longest, args.batch * longest, args.batch, **options)
    outside_model(llm, Load(min(args.lengths), args.new_tokens, args.batch))  # compiles kernels
    for length in args.lengths:
        load = Load(length, args.new_tokens, args.batch)
        for phase, (seconds, outside) in outside_model(llm, load).items():
            line = {
                "bench": "overhead",
                "model": args.model,
                **versions(),
                "layers": args.layers,
                "engine": "compiled" if args.compiled else "eager",
                "async_scheduling": is_async,
                "tokens": length,
                "new_tokens": args.new_tokens,
                "batch": args.batch,
                "phase": phase,
                "seconds": seconds,
                "outside": outside,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
