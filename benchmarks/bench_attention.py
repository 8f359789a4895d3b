# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""One layer's attention: our kernels beside those of others, one JSON line for each.

    python benchmarks/bench_attention.py --quick >> benchmarks/results/attention.jsonl
    python benchmarks/bench_attention.py --block-size 128 64 32 16 --lengths 65536 16384 \
        --density 0.3 0.1 --kernels fa3_dense ours_gluon block_scores select_blocks

Kernels take turns, in another order each round. `ms` is the median of the rounds, `spread` the
widest difference between two. `tflops` counts kept blocks only, `ratio_to_fa3` compares with
FlashAttention 3 over all keys in the same rounds, `ratio_to_floor` with the kept blocks' operations
at 989 TFLOP/s. A kernel that cannot run here, or whose result is not attention, is named on stderr
and not timed.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
from attention.cases import BLOCK, CANVAS, DEVICE, LISTS, SHAPES, Case
from attention.check import fault
from attention.contenders import MAKERS, NAMES, Contender, Maker
from attention.timing import measure, spread
from budget import Budget, note

from sparsed_vllm.kernels import api

PEAK = 989e12  # an H100's dense bf16 operations a second
QUICK = {"shape": ["llada"], "lengths": [65536, 16384, 4096], "density": [0.3]}
SLOW = {"flex_autotuned"}  # to compile: no part of the quick set


def contenders(case: Case, names: Sequence[str]) -> list[Contender]:
    """Those of `names` that run here and are right, each run once."""
    found: list[Contender] = []
    for maker, (make, own) in MAKERS.items():
        if wanted := set(own) & set(names):
            found += runnable(case, maker, make, wanted)
    return found


def runnable(case: Case, maker: str, make: Maker, wanted: set[str]) -> Iterator[Contender]:
    try:
        for contender in make(case):
            if contender.name not in wanted:
                continue
            if problem := problem_of(contender, case):
                note(f"{contender.name} is not timed: {problem}")
            else:
                yield contender
    except ImportError as error:
        note(f"{maker} is not installed: {error}")
    except Exception as error:  # of other libraries, of any kind
        note(f"{maker} does not run: {' '.join(repr(error).split()):.300}")


def problem_of(contender: Contender, case: Case) -> str | None:
    out = contender.call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    if contender.sees == "nothing":
        return None
    return fault(contender.result(out), case, lists=contender.sees == "lists")


def line_of(
    case: Case, contender: Contender, times: list[float], fa3: list[float] | None
) -> dict[str, object]:
    """times: milliseconds of each round;  fa3: those of dense FlashAttention 3, if it ran"""
    ms, share = statistics.median(times), contender.share(case)
    heads, kv_heads, dim = SHAPES[case.shape]
    operations = 4 * case.length**2 * heads * dim * share
    return {
        "bench": "attention",
        "kernel": contender.name,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shape": case.shape,
        "tokens": case.length,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": dim,
        "lists": case.lists,
        "asked": case.density,
        "density": round(share, 4),
        "block_size": case.block_size,
        "rounds": len(times),
        "ms": round(ms, 4),
        "spread": round(spread(times), 4),
        "tflops": round(operations / ms / 1e9, 1),
        "ratio_to_fa3": round(ms / statistics.median(fa3), 4) if fa3 else None,
        "ratio_to_floor": round(ms * PEAK / operations / 1e3, 3) if operations else None,
    }


def run_case(case: Case, names: Sequence[str], rounds: int) -> None:
    found = contenders(case, names)
    times = measure({each.name: each.call for each in found}, rounds)
    for each in found:
        line = line_of(case, each, times[each.name], times.get("fa3_dense"))
        print(json.dumps(line), flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", nargs="+", choices=SHAPES, default=["llada"])
    add("--lengths", type=int, nargs="+", default=[4096, 16384, 65536], help="in this order")
    add("--density", type=float, nargs="+", default=[0.3])
    add("--lists", nargs="+", choices=LISTS, default=["random"])
    add(
        "--block-size",
        type=int,
        nargs="+",
        choices=api.BLOCK_SIZES,
        default=[BLOCK],
        help="of keys",
    )
    add("--kernels", nargs="+", choices=NAMES, default=list(NAMES), metavar="KERNEL")
    add("--without", nargs="+", choices=NAMES, default=[], metavar="KERNEL")
    add("--rounds", type=int, default=7)
    add("--budget", type=float, help="seconds: cases that would take longer are left out")
    add("--quick", action="store_true", help="LLaDA's shape, 30%%, in a minute")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK, rounds=5, without=[*args.without, *SLOW])
    args.kernels = [name for name in args.kernels if name not in args.without]
    if problem := why_not(args):
        parser.error(problem)
    return args


def why_not(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, in one line."""
    for length in args.lengths:
        if length <= CANVAS or length % BLOCK:
            return f"--lengths must be multiples of {BLOCK} over {CANVAS}, got {length}."
    for density in args.density:
        if not 0 < density <= 1:
            return f"--density must be over 0, up to 1, got {density}."
    if args.rounds < 1:
        return f"--rounds must be at least 1, got {args.rounds}."
    if args.budget is not None and args.budget <= 0:
        return f"--budget must be over 0 seconds, got {args.budget}."
    return None if args.kernels else "--without leaves no kernel to time."


def sweep(args: argparse.Namespace) -> None:
    """All densities and lists of a length before the next, so that compiled kernels are reused."""
    budget = Budget(args.budget)
    of = (args.shape, args.lengths, args.density, args.lists, args.block_size)
    for sizes in itertools.product(*of):
        case = Case(*sizes)
        torch.manual_seed(0)
        call = partial(run_case, case, args.kernels, args.rounds)
        budget.run(str(case), float(case.length**2), call)
        gc.collect()


if __name__ == "__main__":
    arguments = parse()
    if DEVICE != "cuda":
        sys.exit("bench_attention.py times kernels on an NVIDIA GPU; there is none here.")
    sweep(arguments)
