# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What sparsity costs: answers of the needle model, dense and sparse, over the same questions.

    python benchmarks/bench_quality.py                      # a small version: minutes on a CPU
    python benchmarks/bench_quality.py --lengths 1024 2048 4096 --samples 64 --steps 32

Six tasks after RULER (examples/needle/tasks.py). Shares of an answer's tokens, which includes the
keys it repeats, and of answers that are right as a whole, each with a 95% interval in which a
question is the unit. All methods answer the same questions, so differences to dense attention are
taken question by question. Prints tables, and appends JSON lines to --out.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import torch
from needle import checkpoint
from needle.tasks import TASKS
from quality import answers
from quality.methods import DENSE, METHODS
from quality.questions import CANVASES, SHORTEST, Question, draw, mark
from quality.report import Results, tables
from tqdm import tqdm

from sparsed_vllm.kernels.api import BLOCK_SIZES

ROOT = Path(__file__).parents[1]
ROUND = 4  # questions of each task that go through all methods before more are drawn
BATCH_TOKENS = {"cpu": 4096, "cuda": 131072}  # of one forward pass


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=checkpoint.SHIPPED, help="a checkpoint folder")
    add("--lengths", type=int, nargs="+", default=[512], help="tokens of a prompt")
    add("--tasks", nargs="+", default=list(TASKS), help=", ".join(TASKS))
    add("--methods", nargs="+", default=list(METHODS), help=", ".join(METHODS))
    add("--samples", type=int, default=4, help="questions of each task and length")
    add("--seconds", type=float, help="stop early, after as many questions as fit")
    add("--steps", type=int, default=16)
    add("--canvas", type=int, default=32, help="tokens to denoise")
    add("--block-size", type=int, default=32, help=", ".join(map(str, BLOCK_SIZES)))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--dtype", help="float32 or bfloat16; left out, that on a CPU and this on a GPU")
    add("--engine", action="store_true", help="through LLM.generate: dense and SparseD only")
    add("--out", type=Path, default=ROOT / "benchmarks/results/quality.jsonl")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or answers.DTYPES.get(args.device)
    if problem := why_not(args):
        parser.exit(2, f"{parser.prog}: {problem}\n")
    if args.engine:
        args.methods = [name for name in args.methods if METHODS[name].request]
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
        ("--tasks", args.tasks, list(TASKS)),
        ("--methods", args.methods, list(METHODS)),
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
    return None


def measure(args: argparse.Namespace, answerer: answers.Harness | answers.Engine) -> Results:
    """Round after round: the same few questions for every method."""
    results, begin = Results(), time.monotonic()
    rounds = range(0, args.samples, ROUND)
    total = len(rounds) * len(args.lengths) * len(args.methods)
    with tqdm(total=total, unit="method") as bar:  # in log files too: a CPU takes long
        for done, first in enumerate(rounds):
            spent = time.monotonic() - begin
            if args.seconds and done and spent * (done + 1) / done > args.seconds:
                break
            indices = range(first, min(first + ROUND, args.samples))
            for length in args.lengths:
                questions = [draw(t, length, args.canvas, i) for t in args.tasks for i in indices]
                for name in args.methods:
                    bar.set_description(f"{length} tokens, {METHODS[name].label}")
                    answer(args, answerer, name, questions, results)
                    bar.update()
    return results


def answer(
    args: argparse.Namespace,
    answerer: answers.Harness | answers.Engine,
    name: str,
    questions: list[Question],
    results: Results,
) -> None:
    """Put one method to the questions, as many at once as a forward pass takes."""
    length, begin = len(questions[0].prompt), time.monotonic()
    size = max(1, BATCH_TOKENS[args.device] // (length + args.canvas))
    for first in range(0, len(questions), size):
        part = questions[first : first + size]
        given, results.densities[length, name] = answerer.answer(METHODS[name], part)
        for question, tokens in zip(part, given, strict=True):
            results.add(length, name, question.task, mark(question, tokens))
    before = results.seconds.get((length, name), 0)
    results.seconds[length, name] = before + time.monotonic() - begin


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
    }


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
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
