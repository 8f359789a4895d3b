# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What the reuse of keys and values costs in answers: the needle model, through LLM.generate.

    python benchmarks/bench_quality_reuse.py --canvas 32 --questions 40 \\
        >> benchmarks/results/quality_reuse.jsonl
    python benchmarks/bench_quality_reuse.py --questions 2 --lengths 400 --canvas 32 --steps 8

Dense, SparseD, and selective refresh (docs/reuse.md) at several settings answer the same questions,
those of bench_quality.py. Prints a JSON line for each method and length, and one without `length`
for all lengths: right tokens and right answers in percent, and their differences to dense attention
question by question (`_gain`), each with half of its 95% interval (`_margin`). `steps`: of a
request. `passes`: tokens of its prompt that these computed, in whole prompts. Both are means, from
the counts of the engine's scheduler.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from needle.tasks import TASKS
from quality.answers import DTYPES, Engine, start_engine
from quality.methods import DENSE, REUSE_METHODS, Method
from quality.questions import CANVASES, SHORTEST, Question, draw, mark
from quality.report import Cell, flat

from sparsed_vllm.kernels.api import BLOCK_SIZES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CACHE_BYTES = {"cpu": 1 << 30, "cuda": 12 << 30}  # room for 256 requests of 4224 tokens in bf16


@dataclass
class Answered:
    """What became of questions that one method was asked.

    cell: their marks;  steps, passes: summed over the questions
    """

    cell: Cell = field(default_factory=Cell)
    steps: float = 0
    passes: float = 0

    def __add__(self, other: "Answered") -> "Answered":
        cell = Cell(self.cell.marks + other.cell.marks)
        return Answered(cell, self.steps + other.steps, self.passes + other.passes)

    def line(self, dense: "Answered") -> dict[str, Any]:
        """dense: of the same questions"""
        tokens_gain, exact_gain = self.cell.gain(dense.cell)
        count = len(self.cell.marks)
        return {
            "questions": count,
            **flat({"tokens": self.cell.tokens(), "exact": self.cell.exact()}),
            **flat({"tokens_gain": tokens_gain, "exact_gain": exact_gain}),
            "passes": round(self.passes / count, 3),
            "steps": round(self.steps / count, 2),
        }


def ask(engine: Engine, method: Method, questions: list[Question]) -> Answered:
    """questions: of one length"""
    tally = engine.llm.llm_engine.engine_core.engine_core.scheduler.tally
    tally.take()
    given, _ = engine.answer(method, questions)
    counts = tally.take()
    marks = [mark(question, tokens) for question, tokens in zip(questions, given, strict=True)]
    steps = counts["denoising_steps"]
    # The canvas is one block, so every step computes all of it.
    prompt_rows = counts["computed_rows"] - steps * engine.canvas
    return Answered(Cell(marks), steps, prompt_rows / len(questions[0].prompt))


def measure(llm: Any, args: argparse.Namespace, canvas: int) -> Iterator[dict[str, Any]]:
    """The lines of all methods, dense attention first."""
    extras = {} if args.threshold is None else {"threshold": args.threshold}
    engine = Engine(llm, canvas, args.steps or canvas, args.block_size, **extras)
    indices = range(args.first, args.first + args.questions)
    questions = {
        length: [draw(task, length, canvas, i) for task in args.tasks for i in indices]
        for length in args.lengths
    }
    dense: dict[int, Answered] = {}
    for name in args.methods:
        begin = time.monotonic()
        method = REUSE_METHODS[name]
        answered = {length: ask(engine, method, part) for length, part in questions.items()}
        dense = dense or answered
        key = {"method": name, "canvas": canvas, **settings(method)}
        for length, one in answered.items():
            yield {**key, "length": length, **one.line(dense[length])}
        whole = sum(answered.values(), Answered()).line(sum(dense.values(), Answered()))
        yield {**key, **whole}
        tell(f"canvas {canvas}, {method.label}: {time.monotonic() - begin:.1f} s")


def settings(method: Method) -> dict[str, Any]:
    """How a method reuses keys and values; None where it does not."""
    reuse = method.reuse
    return {
        "share": reuse and reuse.share,
        "every": reuse and reuse.every,
        "refresh": reuse and reuse.refresh,
        "sparse": method.table == "recorded",
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
        additional_config={"reuse": {"by_default": 0}},
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
    add("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    add("--methods", nargs="+", default=list(REUSE_METHODS), choices=list(REUSE_METHODS))
    add("--questions", type=int, default=40, help="of each task and length")
    add("--first", type=int, default=0, help="number of the first question, to ask fresh ones")
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
    args.methods = list(dict.fromkeys([DENSE.name, *args.methods]))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    llm = start(args)
    shared = {
        "bench": "quality_reuse",
        **versions(),
        "dtype": args.dtype,
        "block_size": args.block_size,
        "threshold": args.threshold,
        "first": args.first,
    }
    for canvas in args.canvas:
        for line in measure(llm, args, canvas):
            print(json.dumps({**shared, **line}), flush=True)


if __name__ == "__main__":
    main()
