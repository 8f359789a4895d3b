# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What sparsity costs: answers of the needle model, dense and sparse, over the same questions.

    python benchmarks/bench_quality.py                      # a small version: minutes on a CPU
    python benchmarks/bench_quality.py --lengths 1024 2048 4096 --samples 64 --steps 32
    python benchmarks/bench_quality.py --model examples/needle/long_model --lengths 16384 32768 \\
        --steps 32 --samples 64 --methods sparsed-0.3 sparsed-0.1 sparsed-0.1-blocks-128 \\
        --marks marks.jsonl --seconds 540 --out benchmarks/results/quality_long.jsonl

Six tasks after RULER (examples/needle/tasks.py), on a canvas of 128 those of long answers too.
Shares of an answer's tokens, which includes the keys it repeats, and of answers that are right as a
whole, each with a 95% interval in which a question is the unit. All methods answer the same
questions, so differences to dense attention are taken question by question. Prints tables, and
appends JSON lines to --out. With --marks a run goes on where one before it ended, with other
methods too: what the file knows is not asked again.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import torch
from needle import checkpoint
from needle.tasks import ALL_TASKS
from quality import answers
from quality.marks import Answered, MarkFile
from quality.methods import DENSE, METHODS, method_of
from quality.questions import (
    CANVASES,
    SHORTEST,
    Question,
    draw,
    mark,
    tasks_of,
    why_too_long,
)
from quality.report import Cell, Results, tables
from tqdm import tqdm

from sparsed_vllm.kernels.api import BLOCK_SIZES

ROOT = Path(__file__).parents[1]
# Questions of each task that go through all methods before more are drawn.
ROUND, LONG_ROUND = 4, 2
LONG = 8192  # tokens of a prompt from which rounds are smaller, for they take long
BATCH_TOKENS = {"cpu": 4096, "cuda": 131072}  # of one forward pass


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=checkpoint.SHIPPED, help="a checkpoint folder")
    add("--lengths", type=int, nargs="+", default=[512], help="tokens of a prompt")
    add("--tasks", nargs="+", help=", ".join(ALL_TASKS))
    add("--methods", nargs="+", default=list(METHODS), help=", ".join(METHODS))
    add("--samples", type=int, default=4, help="questions of each task and length")
    add("--seconds", type=float, help="stop early, after as many questions as fit")
    add("--seed", type=int, default=0, help="each asks fresh questions")
    add("--marks", type=Path, help="a file for marks; what it knows is not asked again")
    add("--steps", type=int, default=16)
    add("--canvas", type=int, default=32, help="tokens to denoise")
    add("--block-size", type=int, default=32, help=", ".join(map(str, BLOCK_SIZES)))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--dtype", help="float32 or bfloat16; left out, that on a CPU and this on a GPU")
    add("--engine", action="store_true", help="through LLM.generate: dense and SparseD only")
    add("--out", type=Path, default=ROOT / "benchmarks/results/quality.jsonl")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or answers.DTYPES.get(args.device)
    args.tasks = args.tasks or tasks_of(args.canvas)
    if problem := why_not(args):
        parser.exit(2, f"{parser.prog}: {problem}\n")
    if args.engine:
        args.methods = [name for name in args.methods if method_of(name).request]
    args.methods = list(dict.fromkeys([DENSE.name, *args.methods]))
    return args


def why_not(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, in one line."""
    config = args.model / "config.json"
    if not config.is_file():
        return f"--model is a folder with a config.json, got {args.model}."
    longest = json.loads(config.read_text())["max_sequence_length"] - args.canvas
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    lists = [
        ("--tasks", args.tasks, list(ALL_TASKS)),
        ("--block-size", [args.block_size], list(BLOCK_SIZES)),
        ("--device", [args.device], devices),
        ("--dtype", [args.dtype], list(answers.DTYPES.values())),
    ]
    ranges = [
        ("--canvas", [args.canvas], CANVASES[0], CANVASES[-1]),
        ("--lengths", args.lengths, SHORTEST, longest),
        ("--samples", [args.samples], 2, None),
        ("--steps", [args.steps], 1, args.canvas),
        ("--seconds", [] if args.seconds is None else [args.seconds], 1, None),
    ]
    for name, values, allowed in lists:
        for value in set(values) - set(allowed):
            return f"{name} must be of {', '.join(map(str, allowed))}, got {value}."
    for name, values, least, most in ranges:
        for value in values:
            if value < least or (most is not None and value > most):
                limits = f"at least {least}" if most is None else f"{least} to {most}"
                return f"{name} must be {limits}, got {value}."
    try:
        for name in args.methods:
            method_of(name)
    except ValueError as error:
        return str(error)
    return why_too_long(args.tasks, args.canvas)


def measure(args: argparse.Namespace, answerer: answers.Harness | answers.Engine) -> Results:
    """Round after round: the same few questions for every method."""
    results, kept = Results(), MarkFile(args.marks)
    size = ROUND if max(args.lengths) < LONG else LONG_ROUND
    rounds = [range(i, min(i + size, args.samples)) for i in range(0, args.samples, size)]
    total = args.samples * len(args.tasks) * len(args.lengths) * len(args.methods)
    begin, longest = time.monotonic(), 0.0
    with tqdm(total=total, unit="answer") as bar:  # in log files too: a CPU takes long
        for indices in rounds:
            before = time.monotonic()
            if args.seconds and indices[0] and before - begin + longest > args.seconds:
                break
            for part in parts(args, indices):
                for name in args.methods:
                    bar.set_description(f"{len(part[0].prompt)} tokens, {method_of(name).label}")
                    note(results, name, part, settle(args, answerer, kept, name, part))
                    bar.update(len(part))
            longest = max(longest, time.monotonic() - before)
    return results


def parts(args: argparse.Namespace, indices: range) -> Iterator[list[Question]]:
    """The questions of a round: of one length, and as many at once as a forward pass takes.

    All methods answer one part before the next, for they share the dense steps of the last.
    """
    for length in args.lengths:
        drawn = [draw(t, length, args.canvas, i, args.seed) for t in args.tasks for i in indices]
        size = max(1, BATCH_TOKENS[args.device] // (length + args.canvas))
        yield from (drawn[first : first + size] for first in range(0, len(drawn), size))


def settle(
    args: argparse.Namespace,
    answerer: answers.Harness | answers.Engine,
    kept: MarkFile,
    name: str,
    part: list[Question],
) -> Answered:
    """One method's answers to a part, unless they are known."""
    method = method_of(name)
    size = None if method.table == "none" else method.block_size or args.block_size
    of = {**setting(args), "method": name, "block_size": size, "weights": args.weights}
    of["prompts"] = digest(json.dumps([question.prompt for question in part]).encode())
    known = kept.get(of)
    if known is not None:
        return known
    begin = time.monotonic()
    given, density = answerer.answer(method, part)
    marks = [mark(question, tokens) for question, tokens in zip(part, given, strict=True)]
    answered = Answered(Cell(marks), seconds=time.monotonic() - begin, density=density)
    kept.add(of, answered)
    return answered


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def note(results: Results, name: str, part: list[Question], answered: Answered) -> None:
    length = len(part[0].prompt)
    for question, own in zip(part, answered.cell.marks, strict=True):
        results.add(length, name, question.task, own)
    results.densities[length, name] = answered.density
    before = results.seconds.get((length, name), 0)
    results.seconds[length, name] = before + answered.seconds


def setting(args: argparse.Namespace) -> dict[str, object]:
    """What a line says of the run."""
    gpu = args.device == "cuda"
    return {
        "bench": "quality",
        "through": "engine" if args.engine else "harness",
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "dtype": args.dtype,
        "torch": torch.__version__,
        "canvas": args.canvas,
        "steps": args.steps,
        "block_size": args.block_size,
        **({"seed": args.seed} if args.seed else {}),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.weights = digest((args.model / checkpoint.WEIGHTS).read_bytes())
    sizes = (args.canvas, args.steps, args.block_size)
    if args.engine:
        # In this process: it has asked for CUDA, after which vLLM's could not be forked.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        answerer = answers.Engine(answers.start_engine(args.model, dtype=args.dtype), *sizes)
    else:
        network = answers.load(args.model, torch.device(args.device), args.dtype)
        answerer = answers.Harness(network, *sizes)
    lines = list(measure(args, answerer).lines())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as out:
        out.writelines(json.dumps({**setting(args), **line}) + "\n" for line in lines)
    print(tables(lines))


if __name__ == "__main__":
    main()
