# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Train the needle model: a small LLaDA that finds what is hidden in long texts.

    python examples/train_needle.py --out needle

Nine minutes on an H100. Texts are made on the fly (needle/tasks.py). A line of progress comes
with the first step and then every ten seconds, and the checkpoint is written anew with it: whoever
interrupts the training (Ctrl-C, SIGTERM) keeps the last one. At the end the model is examined: for
each length and task, the share of the answers' tokens and of the whole answers that are right.

A CPU is a few hundred times slower. There batches are smaller, and a few minutes show the loss
fall, but are far from a model that answers.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from needle import checkpoint, evaluation
from needle.network import Network, Shape
from needle.tasks import TASKS
from needle.training import Plan, train


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argument in a range, ends included."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not from {low:g} to {high:g}")
        return value

    return read


ON_GPU = torch.cuda.is_available()


def parse() -> argparse.Namespace:
    longest = Shape().max_sequence_length - evaluation.CANVAS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=number(float, 0.01, 1440), default=8.5)
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0)
    spare = max(1, min(14, (os.cpu_count() or 1) - 1))
    parser.add_argument("--workers", type=number(int, 1, 256), default=spare, help="draw batches")
    samples = 64 if ON_GPU else 2
    parser.add_argument(
        "--samples", type=number(int, 1, 10**6), default=samples, help="a task, length"
    )
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=list(TASKS), help="examined")
    parser.add_argument(
        "--lengths",
        type=number(int, 96, longest),
        nargs="+",
        default=[512, 1024, 2048, 4096] if ON_GPU else [128],
        help="of examined prompts, in tokens",
    )
    return parser.parse_args()


def examine(network: Network, args: argparse.Namespace) -> None:
    for length in args.lengths:
        for task in args.tasks:
            exam = evaluation.draw(task, length, args.samples, args.seed)
            tokens, exact = evaluation.evaluate(network, exam)
            print(
                f"{length:5d} tokens  {task:10}  tokens {tokens:.3f}  exact {exact:.3f}", flush=True
            )


def interrupt(number: int, frame: object) -> None:
    """SIGTERM ends the training as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        run(args)
    except KeyboardInterrupt:
        weights = args.out / checkpoint.WEIGHTS
        kept = f"{args.out} holds the last checkpoint" if weights.exists() else "nothing saved yet"
        sys.exit(f"interrupted: {kept}")


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if ON_GPU else "cpu")
    network = Network(Shape()).to(device)
    size = sum(weight.numel() for weight in network.parameters())
    print(f"{size / 1e6:.2f} M parameters, {args.minutes:g} minutes on {device.type}", flush=True)
    started = time.time()
    train(
        network,
        Plan(args.minutes, batch_tokens=8192 if ON_GPU else 2048),
        seed=args.seed,
        workers=args.workers,
        save=lambda: checkpoint.save(network, args.out),
    )
    print(f"trained in {time.time() - started:.0f} s: {args.out}", flush=True)
    examine(network, args)


if __name__ == "__main__":
    main()
