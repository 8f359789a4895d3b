# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What the reuse of keys and values costs in answers: the needle model, through LLM.generate.

    python benchmarks/bench_quality_reuse.py --canvas 32 --questions 40 \\
        >> benchmarks/results/quality_reuse.jsonl
    python benchmarks/bench_quality_reuse.py --questions 2 --lengths 400 --canvas 32 --steps 8 \\
        --methods reuse-0.02 reuse-0.02-every-2-sparse dual-8

Dense, SparseD, and selective refresh (docs/reuse.md) at several settings answer the same
questions, those of bench_quality.py; Fast-dLLM's caches do over the network in plain PyTorch.
Methods are named by their settings (quality/reuse_methods.py). Prints a JSON line for each method
and length, and one without `length` for all lengths: right tokens and right answers in percent, and
their differences to dense attention question by question (`_gain`), each with half of its 95%
interval (`_margin`). `steps`: of a request. `passes`: tokens of its prompt that these computed, in
whole prompts; both are means. Progress goes to stderr. With --marks a run that was cut short goes
on where it was.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

# In this process: rows and steps are counted by its scheduler.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
sys.path.append(str(Path(__file__).parents[1] / "examples"))

import torch
from generation.dummies import versions
from needle import checkpoint
from needle.tasks import ALL_TASKS, TASKS
from quality import experiments
from quality.answers import DTYPES, CachedHarness, Engine, load, start_engine
from quality.marks import Answered, MarkFile
from quality.methods import DENSE
from quality.questions import CANVASES, SHORTEST, Question, draw, mark, why_too_long
from quality.report import Cell
from quality.reuse_methods import REUSE_METHODS, ReuseMethod, method_of

from sparsed_vllm.kernels.api import BLOCK_SIZES
from sparsed_vllm.tally import Progress, Tally

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CACHE_BYTES = {"cpu": 1 << 30, "cuda": 12 << 30}  # room for 256 requests of 4224 tokens in bf16


class PromptTally(Tally):
    """Counts, besides, the prompts that steps computed; what a step chooses is of the prompt."""

    def take_step(self, progress: Progress) -> None:
        plan, step = progress.plan, progress.plan.at(progress.cursor.step)
        before = max(0, plan.prompt_len - step.first_row)
        self.counts["prompts"] += (step.num_chosen + before) / plan.prompt_len
        super().take_step(progress)


class Contest:
    """Puts questions to methods, with one canvas."""

    def __init__(self, llm: Any, args: argparse.Namespace, canvas: int) -> None:
        self.args, self.canvas, self.steps = args, canvas, args.steps or canvas
        extras = {} if args.threshold is None else {"threshold": args.threshold}
        self.engine = Engine(llm, canvas, self.steps, args.block_size, **extras)
        self.tally = llm.llm_engine.engine_core.engine_core.scheduler.tally = PromptTally()

    @cached_property
    def network(self) -> CachedHarness:
        args = self.args
        network = load(args.model, torch.device(DEVICE), args.dtype).eval()
        return CachedHarness(network, self.canvas, self.steps, args.batch, args.threshold)

    def ask(self, method: ReuseMethod, questions: list[Question]) -> Answered:
        """questions: of one length"""
        begin = time.monotonic()
        run = self._ask_engine if method.cache is None else self._ask_network
        given, steps, passes = run(method, questions)
        marks = [mark(question, tokens) for question, tokens in zip(questions, given, strict=True)]
        return Answered(Cell(marks), steps, passes, time.monotonic() - begin)

    def _ask_engine(
        self, method: ReuseMethod, questions: list[Question]
    ) -> tuple[list[list[int]], float, float]:
        self.tally.take()
        with experiments.applied(self.engine.llm, method.experiment):
            given, _ = self.engine.answer(method, questions)
        counts = self.tally.take()
        return given, counts["denoising_steps"], counts["prompts"]

    def _ask_network(
        self, method: ReuseMethod, questions: list[Question]
    ) -> tuple[list[list[int]], float, float]:
        network = self.network
        network.steps = network.passes = 0
        given, _ = network.answer(method, questions)
        return given, network.steps, network.passes


def measure(llm: Any, args: argparse.Namespace, canvas: int) -> Iterator[dict[str, Any]]:
    """The lines of all methods, dense attention first."""
    contest, kept = Contest(llm, args, canvas), MarkFile(args.marks)
    questions = {
        length: [
            draw(task, length, canvas, i, args.seed)
            for task in args.tasks
            for i in range(args.questions)
        ]
        for length in args.lengths
    }
    dense: dict[int, Answered] = {}
    for method in args.methods:
        answered = {
            length: settle(contest, kept, method, part) for length, part in questions.items()
        }
        dense = dense or answered
        key = {"method": method.name, "canvas": canvas, **settings(method)}
        for length, one in answered.items():
            yield {**key, "length": length, **one.line(dense[length])}
        whole = sum(answered.values(), Answered()).line(sum(dense.values(), Answered()))
        yield {**key, **whole}
        gains = "{tokens_gain:+} tokens, {exact_gain:+} answers, {passes} passes, {steps} steps, "
        tell(f"canvas {canvas}, {method.name}: " + (gains + "{seconds} s").format(**whole))


def settle(
    contest: Contest, kept: MarkFile, method: ReuseMethod, questions: list[Question]
) -> Answered:
    """The answers to questions of one length, unless they are known."""
    args, length = contest.args, len(questions[0].prompt)
    of = {
        **{name: getattr(args, name) for name in ("dtype", "threshold", "seed", "block_size")},
        **{"device": DEVICE, "tasks": args.tasks, "questions": args.questions, "length": length},
        **{"method": method.name, "canvas": contest.canvas, "steps": contest.steps},
    }
    known = kept.get(of)
    if known is not None:
        return known
    tell(f"canvas {contest.canvas}, {method.name}: {len(questions)} questions of {length} tokens")
    answered = contest.ask(method, questions)
    kept.add(of, answered)
    return answered


def settings(method: ReuseMethod) -> dict[str, Any]:
    """How a method reuses keys and values; None where it does not."""
    reuse = method.reuse
    return {
        "share": reuse and reuse.share,
        "every": reuse and reuse.every,
        "refresh": reuse and reuse.refresh,
        "choice": reuse and reuse.choice,
        "sparse": method.table == "recorded",
        "mass": method.mass,
        "record": method.refresh,
        "block_length": method.block_length,
        "experiment": dict(method.experiment),
    }


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def start(args: argparse.Namespace) -> Any:
    """An engine whose requests reuse keys and values where they say so."""
    return start_engine(
        args.model,
        dtype=args.dtype,
        max_num_seqs=args.batch,
        max_num_batched_tokens=args.batch_tokens,
        kv_cache_memory_bytes=CACHE_BYTES[DEVICE],
        # At 32k tokens SparseD's tables of blocks of 32 do not fit the default's 8.
        additional_config={"reuse": {"by_default": 0, "layers": 1}, "sparsed": {"table_ids": 32}},
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=checkpoint.SHIPPED, help="a checkpoint folder")
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="tokens of a prompt")
    add("--canvas", type=int, nargs="+", default=[32, 128], help="tokens to denoise")
    add("--steps", type=int, help="left out, one a token")
    add("--threshold", type=float, help="decode by this confidence")
    add("--tasks", nargs="+", default=list(TASKS), choices=list(ALL_TASKS), metavar="TASK")
    add("--methods", nargs="+", default=list(REUSE_METHODS), metavar="NAME", help="see above")
    add("--questions", type=int, default=40, help="of each task and length")
    add("--seed", type=int, default=0, help="each asks fresh questions")
    add("--marks", type=Path, help="a file for marks by question; what it knows is not asked again")
    add("--block-size", type=int, default=32, choices=list(BLOCK_SIZES), help="of SparseD's tables")
    add("--batch", type=int, default=256, help="requests that run at once")
    add("--batch-tokens", type=int, default=131072, help="tokens of an engine step")
    add("--dtype", default=DTYPES[DEVICE], choices=list(DTYPES.values()))
    args = parser.parse_args(argv)
    longest = json.loads((args.model / "config.json").read_text())["max_sequence_length"]
    fits = max(args.lengths) + max(args.canvas) <= longest
    is_long = min(args.lengths) >= SHORTEST and min(args.canvas) >= CANVASES[0]
    if not (fits and is_long and args.questions >= 2):
        limits = f"--lengths must be at least {SHORTEST}, --canvas at least {CANVASES[0]}, "
        limits += f"both together at most {longest}, --questions at least 2"
        parser.exit(2, f"{parser.prog}: {limits}.\n")
    if problem := why_too_long(args.tasks, min(args.canvas)):
        parser.exit(2, f"{parser.prog}: {problem}\n")
    try:
        args.methods = [method_of(name) for name in dict.fromkeys([DENSE.name, *args.methods])]
        for method in args.methods:
            check_blocks(method, args)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return args


def check_blocks(method: ReuseMethod, args: argparse.Namespace) -> None:
    """Raises ValueError where Fast-dLLM's loop cannot share out the canvas, or the steps."""
    block = method.block_length
    for canvas in args.canvas if method.cache and block else []:
        if canvas % block or (args.steps or canvas) % (canvas // block):
            raise ValueError(
                f"{method.name} must divide the canvas, and its blocks the steps; got "
                f"{canvas} places and {args.steps or canvas} steps."
            )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    llm = start(args)
    shared = {
        "bench": "quality_reuse",
        **versions(),
        "dtype": args.dtype,
        "block_size": args.block_size,
        "threshold": args.threshold,
        "seed": args.seed,
    }
    for canvas in args.canvas:
        for line in measure(llm, args, canvas):
            print(json.dumps({**shared, **line}), flush=True)


if __name__ == "__main__":
    main()
