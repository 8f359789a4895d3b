# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How long the host works on a step outside vLLM's own code, and on who takes part in it.

    python benchmarks/bench_host.py --batch 64 --tokens 640
    python benchmarks/bench_host.py --batch 64 --heads 8    # as many launches, of shorter kernels
    python benchmarks/bench_host.py --share 0.02            # light steps, captured if they may be
    python benchmarks/bench_host.py --queue-only

`seconds` is the median over the steps of a phase of the time that this package's own functions
take on the host, launches of kernels among them; what they call in vLLM is left out. On a CPU the
kernels' own time is in it. `queue`: take_turns with so many running and waiting requests.
--profile says besides, on stderr, which functions the steps of each phase spend the time in.
"""

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

import torch
from generation.dummies import MODELS, PUBLISHED, SKIP, request, start, versions
from generation.machine import wait
from vllm.v1.core.sched.scheduler import Scheduler

from sparsed_vllm import attention, model_state
from sparsed_vllm.flash import flash_attention
from sparsed_vllm.model_state import DenoisingModelState
from sparsed_vllm.models.network import MaskPredictor
from sparsed_vllm.sampler import DenoisingSampler
from sparsed_vllm.scheduler import DenoisingScheduler
from sparsed_vllm.steps import phase_of
from sparsed_vllm.turns import Claim, Room, take_turns

OURS = (
    DenoisingScheduler,
    DenoisingModelState,
    DenoisingSampler,
    attention.SparsedMetadataBuilder,
    attention.SparsedImpl,
)
SUPERS = [name for name in vars(DenoisingScheduler) if callable(getattr(Scheduler, name, None))]


def theirs() -> list[tuple[Any, str]]:
    """vLLM's functions that ours call, by their owners."""
    found: list[tuple[Any, str]] = [(Scheduler, name) for name in SUPERS if name != "__init__"]
    found += [(model_state, "build_attn_metadata"), (MaskPredictor, "score")]
    flash = flash_attention("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    return found if flash is None else [*found, (flash, "function")]


class Stopwatch:
    """Adds up the time inside our functions and outside vLLM's that they call.

    by_name: the same, by the function of ours that is innermost
    """

    def __init__(self) -> None:
        self.by_name: defaultdict[str, float] = defaultdict(float)
        self._stack: list[str | None] = []  # of the functions that run: the names of ours
        self._since = 0.0

    def take(self) -> dict[str, float]:
        """What was added up, which starts again at zero."""
        taken = dict(self.by_name)
        self.by_name.clear()
        return taken

    def timed(self, function: Callable[..., Any], name: str | None) -> Callable[..., Any]:
        """name: None for a function of vLLM's"""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._stack.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._stack.pop()

        return run

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._stack and self._stack[-1] is not None:
            self.by_name[self._stack[-1]] += now - self._since
        self._since = now


@contextmanager
def measuring(watch: Stopwatch) -> Iterator[None]:
    """Time our classes' methods and, within them, vLLM's functions."""
    with ExitStack() as patches:
        for owner in OURS:
            for name, function in list(vars(owner).items()):
                if callable(function) and name != "__init__" and not isinstance(function, type):
                    timed = watch.timed(function, f"{owner.__name__}.{name}")
                    patches.enter_context(patch.object(owner, name, timed))
        for owner, name in theirs():
            timed = watch.timed(getattr(owner, name), None)
            patches.enter_context(patch.object(owner, name, timed))
        yield


def submit(llm: Any, args: argparse.Namespace, batch: int, sparse: bool) -> None:
    """Equal requests, for the engine's next steps."""
    for i in range(batch):
        tables = PUBLISHED if sparse else None
        prompt, params = request(args.tokens, args.new_tokens, args.steps, tables)
        if args.share is not None:
            params.extra_args["kv_share"] = args.share
        llm.llm_engine.add_request(str(i), prompt, params)


def time_steps(
    llm: Any, args: argparse.Namespace, batch: int, sparse: bool
) -> dict[str, list[dict[str, float]]]:
    """Seconds of host work of each step of equal requests, by phase and then by function."""
    watch, taken = Stopwatch(), defaultdict(list)
    submit(llm, args, batch, sparse)
    llm.llm_engine.step()  # admits them
    with measuring(watch):
        for step in range(1, args.steps - 1):
            wait()
            watch.take()
            llm.llm_engine.step()
            taken[phase_at(step, args, sparse)].append(watch.take())
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return taken


def phase_at(step: int, args: argparse.Namespace, sparse: bool) -> str:
    """What a step of the requests is; with reuse all but the first are light."""
    if args.share is not None:
        return "light" if step else "whole"
    return phase_of(step, args.steps, SKIP).value if sparse else "dense"


def profile_steps(llm: Any, args: argparse.Namespace, batch: int, sparse: bool) -> None:
    """Print where the host spends the steps of each phase in our functions and in Triton's."""
    profiles: dict[str, cProfile.Profile] = defaultdict(cProfile.Profile)
    submit(llm, args, batch, sparse)
    step = 0
    while llm.llm_engine.has_unfinished_requests():
        wait()
        with profiles[phase_at(step, args, sparse)]:
            llm.llm_engine.step()
        step += 1
    for phase, profile in profiles.items():
        print(f"batch {batch}, sparse {sparse}, {phase} steps", file=sys.stderr)
        found = pstats.Stats(profile, stream=sys.stderr)
        found.sort_stats("cumtime").print_stats("sparsed_vllm|kernels|triton", 60)


def time_queue(running: int, waiting: int) -> float:
    """Seconds of take_turns with so many requests of mixed lengths."""
    claims = [
        Claim(i, 640 + 97 * (i % 13), i, is_running=i < running, pages=9)
        for i in range(running + waiting)
    ]
    room = Room(65536, seats=running, pages=1 << 20)
    seconds = []
    for i in range(200):
        start_time = time.perf_counter()
        take_turns(claims, room, shortest_first=bool(i % 2))
        seconds.append(time.perf_counter() - start_time)
    return median(seconds)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="llada")
    add("--tokens", type=int, default=640)
    add("--new-tokens", type=int, default=128)
    add("--steps", type=int, default=20)
    add("--batch", type=int, nargs="+", default=[1, 64])
    add("--layers", type=int, help="fewer than the model has")
    add("--heads", type=int, help="fewer than the model has, and layers as narrow")
    add("--share", type=float, help="kv_share: requests reuse keys and values")
    add("--profile", action="store_true", help="also where the time of a step goes")
    add("--queue-only", action="store_true", help="time take_turns alone, without an engine")
    return parser.parse_args(argv)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's; one that reuses is compiled, as served, so that it captures light steps."""
    if args.share is None:
        return {}
    return {"additional_config": {"reuse": {"by_default": 0}}, "enforce_eager": False}


def report(
    llm: Any, args: argparse.Namespace, batch: int, sparse: bool, line: dict[str, Any]
) -> None:
    """Print the median of each phase; line: what all lines say"""
    names = ("model", "layers", "heads", "tokens", "share")
    given = {name: getattr(args, name) for name in names} | {"batch": batch, "sparse": sparse}
    time_steps(llm, args, batch, sparse)  # compiles kernels
    for phase, steps in time_steps(llm, args, batch, sparse).items():
        seconds = median(sum(step.values()) for step in steps)
        print(json.dumps({**line, **given, "phase": phase, "seconds": seconds}), flush=True)
        if args.profile:
            print_shares(f"batch {batch}, sparse {sparse}, {phase} steps", steps)


def print_shares(title: str, steps: list[dict[str, float]]) -> None:
    """Milliseconds of a step by our functions, the largest first."""
    print(title, file=sys.stderr)
    means = {name: fmean(step.get(name, 0) for step in steps) for name in set().union(*steps)}
    for name, seconds in sorted(means.items(), key=lambda pair: -pair[1])[:25]:
        print(f"  {1e3 * seconds:7.3f} ms  {name}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    queue = {"running": 64, "waiting": 512}
    line = {"bench": "host", **versions()}
    print(json.dumps({**line, "phase": "queue", **queue, "seconds": time_queue(**queue)}))
    if args.queue_only:
        return
    most = max(args.batch)
    sizes = (args.tokens, args.tokens * most, most)
    llm = start(args.model, args.layers, *sizes, num_heads=args.heads, **options_of(args))
    for batch in args.batch:
        for sparse in (False, True):
            report(llm, args, batch, sparse, line)
            if args.profile:
                profile_steps(llm, args, batch, sparse)


if __name__ == "__main__":
    main()
