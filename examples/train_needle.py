# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Train the needle model: a small LLaDA that finds what is hidden in long texts.

    python examples/train_needle.py --out examples/needle/model

Eight minutes on an H100. Texts are made on the fly (needle/tasks.py). A line of progress comes
every thousand steps, and the checkpoint is written anew with it. At the end the model is examined:
for each length and task, the share of the answers' tokens and of the whole answers that are right.
"""

import argparse
import math
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


def parse() -> argparse.Namespace:
    longest = Shape().max_sequence_length - evaluation.CANVAS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=number(float, 0.01, 1440), default=7.5)
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0)
    parser.add_argument("--workers", type=number(int, 1, 256), default=14, help="draw batches")
    parser.add_argument("--samples", type=number(int, 1, 10**6), default=64, help="a task, length")
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=list(TASKS), help="examined")
    parser.add_argument(
        "--lengths",
        type=number(int, 96, longest),
        nargs="+",
        default=[512, 1024, 2048, 4096],
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


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = Network(Shape()).to(device)
    size = sum(weight.numel() for weight in network.parameters())
    print(f"{size / 1e6:.2f} M parameters, {args.minutes:g} minutes on {device.type}", flush=True)
    started = time.time()
    train(
        network,
        Plan(args.minutes),
        seed=args.seed,
        workers=args.workers,
        save=lambda: checkpoint.save(network, args.out),
    )
    print(f"trained in {time.time() - started:.0f} s: {args.out}", flush=True)
    examine(network, args)


if __name__ == "__main__":
    main()
