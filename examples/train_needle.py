# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Train the needle model: a small LLaDA that finds what is hidden in long texts.

    python examples/train_needle.py --out needle
    python examples/train_needle.py --continue examples/needle/model --out needle_long \\
        --rope-theta 80000
    python examples/train_needle.py --continue needle_long    # goes on where it was interrupted
    python examples/train_needle.py --examine needle_long

Nine minutes on an H100, and twenty for the continuation, which takes a trained model to texts of
33k tokens, and to tasks of two hops and of long answers. Texts are made on the fly
(needle/tasks.py). A line of progress comes with the first step and then every ten seconds, and the
checkpoint is written anew with it: whoever interrupts the training (Ctrl-C, SIGTERM, --stop-after)
keeps the last one, and beside it training.json, with which it goes on. The plan, the clock and the
stage are kept; the optimizers begin anew. At the end the model is examined: for each length and
task, the share of the answers' tokens and of the whole answers that are right.

A higher rotary base stretches what a model knows over longer texts, even before it is trained:
--examine FOLDER --longest 33024 --rope-theta 80000 shows by how much.

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
from dataclasses import replace
from pathlib import Path

import torch
from needle import checkpoint, evaluation, record
from needle.network import Network, Shape
from needle.plan import LONG_LENGTHS, ROOM, Plan, Standing, continued
from needle.record import Record
from needle.tasks import ALL_TASKS, LONG_CANVAS, RETRIEVAL, TASKS
from needle.training import train


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
BATCH_TOKENS = 8192 if ON_GPU else 2048


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="folder of the checkpoint")
    add("--continue", type=Path, dest="source", help="a checkpoint: without --out, go on there")
    add("--examine", type=Path, help="a checkpoint: train nothing")
    add("--minutes", type=number(float, 0.01, 1440), help="of the plan; 8.5, continued 20")
    add(
        "--stop-after", type=number(float, 0.01, 1440), default=math.inf, help="minutes of this run"
    )
    add("--longest", type=int, choices=LONG_LENGTHS, help="tokens, of a continuation; 33024")
    add("--rope-theta", type=number(float, 100, 1e9), help="of a continuation; the checkpoint's")
    add("--adam-rate", type=number(float, 0, 1), help="the highest, of what is no matrix")
    add("--muon-rate", type=number(float, 0, 1), help="the highest, of matrices")
    add("--seed", type=number(int, 0, 2**31), default=0)
    spare = max(1, min(14, (os.cpu_count() or 1) - 1))
    add("--workers", type=number(int, 1, 256), default=spare, help="draw batches")
    add("--samples", type=number(int, 1, 10**6), help="a task, length; of long texts fewer")
    add("--tasks", choices=ALL_TASKS, nargs="+", help="examined")
    add("--lengths", type=int, nargs="*", help="of examined prompts, in tokens; none: no exam")
    args = parser.parse_args(namespace=argparse.Namespace(resumes=False))
    if problem := why_not(args):
        parser.error(problem)
    args.lengths = lengths_of(args) if args.lengths is None else args.lengths
    shape = shape_of(args)
    longest = shape.max_sequence_length - (LONG_CANVAS if is_long(shape) else evaluation.CANVAS)
    for length in args.lengths:
        if not 96 <= length <= longest:
            parser.error(f"argument --lengths: {length} is not from 96 to {longest}")
    return args


def why_not(args: argparse.Namespace) -> str | None:
    """What is wrong with the folders, in one line; settles where the checkpoint goes."""
    if sum(x is not None for x in (args.examine, args.out or args.source)) != 1:
        return "one of --out, --continue and --examine is needed, and no --out with --examine"
    for name, folder in (("--examine", args.examine), ("--continue", args.source)):
        if folder and not (folder / checkpoint.WEIGHTS).is_file():
            return f"argument {name}: no checkpoint in {folder}"
    if args.examine:
        return None
    if args.source is None:
        given = [name for name in ("longest", "rope_theta") if getattr(args, name) is not None]
        return f"argument --{given[0].replace('_', '-')}: only with --continue" if given else None
    unfinished = record.load(args.source) is not None
    args.out = args.out or args.source
    args.resumes = args.out.resolve() == args.source.resolve()
    if args.resumes and not unfinished:
        return f"argument --continue: no unfinished training in {args.source}; name another --out"
    if args.resumes and (args.longest or args.rope_theta):
        return "argument --continue: --longest and --rope-theta are as the training began"
    if unfinished and not args.resumes:
        return f"argument --continue: the training in {args.source} is not done: leave out --out"
    return None


def shape_of(args: argparse.Namespace) -> Shape:
    """Of the network that is trained or examined."""
    source = args.examine or args.source
    if source is None:
        return Shape()
    shape = checkpoint.shape_of(source)
    begins = args.source is not None and not args.resumes
    longest = args.longest or (LONG_LENGTHS[-1] if begins else 0)
    return replace(
        shape,
        max_sequence_length=max(shape.max_sequence_length, longest + ROOM),
        rope_theta=args.rope_theta or shape.rope_theta,
    )


def is_long(shape: Shape) -> bool:
    """Whether a network was made by a continuation."""
    return shape.max_sequence_length > Shape().max_sequence_length


def lengths_of(args: argparse.Namespace) -> list[int]:
    """Of examined prompts, where none are named."""
    shape = shape_of(args)
    if not ON_GPU:
        return [512 if is_long(shape) else 128]
    lengths = [1024 << i for i in range(6)] if is_long(shape) else [512, 1024, 2048, 4096]
    return [n for n in lengths if n + LONG_CANVAS <= shape.max_sequence_length]


def begin(args: argparse.Namespace) -> tuple[Network, Record]:
    """What is trained, and how."""
    given = {name: getattr(args, name) for name in ("minutes", "adam_rate", "muon_rate")}
    given = {name: value for name, value in given.items() if value is not None}
    shape = shape_of(args)
    if args.source is None:
        plan = replace(Plan(8.5, batch_tokens=BATCH_TOKENS), **given)
        return Network(shape), Record(plan, args.seed, Standing(0.0, plan.first))
    network = checkpoint.load(args.source, shape)
    if args.resumes:
        kept = record.load(args.source)
        assert kept is not None
        return network, replace(kept, plan=replace(kept.plan, **given))
    trained = checkpoint.shape_of(args.source).max_sequence_length - ROOM
    plan = continued(20, args.longest or LONG_LENGTHS[-1], trained, BATCH_TOKENS)
    plan = replace(plan, **given)
    return network, Record(plan, args.seed, Standing(0.0, plan.first))


def examine(network: Network, args: argparse.Namespace) -> None:
    long = is_long(network.shape)
    most = args.samples or ((32 if long else 64) if ON_GPU else 2)
    for length in args.lengths:
        # Of texts of 32k tokens a few questions take as long as all others.
        samples = max(min(most, 8), most * 4096 // max(length, 4096))
        right = {}
        for task in args.tasks or (ALL_TASKS if long else TASKS):
            exam = evaluation.draw(task, length, samples, args.seed)
            right[task], exact = evaluation.evaluate(network, exam)
            print(
                f"{length:5d} tokens  {task:10}  tokens {right[task]:.3f}  exact {exact:.3f}",
                flush=True,
            )
        if found := [right[task] for task in RETRIEVAL if task in right]:
            share = sum(found) / len(found)
            print(
                f"{length:5d} tokens  retrieval   tokens {share:.3f}  of {samples} each", flush=True
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
        if args.examine:
            sys.exit("interrupted")
        weights = args.out / checkpoint.WEIGHTS
        kept = f"{args.out} holds the last checkpoint" if weights.exists() else "nothing saved yet"
        sys.exit(f"interrupted: {kept}")


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if ON_GPU else "cpu")
    if args.examine:
        examine(checkpoint.load(args.examine, shape_of(args)).to(device), args)
        return
    network, begun = begin(args)
    network = network.to(device)
    plan, standing = begun.plan, begun.standing
    size = sum(weight.numel() for weight in network.parameters())
    print(
        f"{size / 1e6:.2f} M parameters, {plan.minutes:g} minutes on {device.type}, "
        f"texts of {plan.lengths[standing.stage]} to {plan.lengths[-1]} tokens",
        flush=True,
    )
    started = time.time()

    def save(now: Standing) -> None:
        is_done = plan.progress(now.seconds) >= 1
        checkpoint.save(network, args.out, plan.mantissa if is_done else checkpoint.MANTISSA)
        record.save(replace(begun, standing=now), args.out)

    now = train(
        network,
        plan,
        seed=begun.seed,
        workers=args.workers,
        save=save,
        standing=standing,
        seconds=60 * args.stop_after,
    )
    spent = time.time() - started
    if plan.progress(now.seconds) < 1:
        print(f"stopped after {spent:.0f} s: --continue {args.out} goes on", flush=True)
        return
    record.remove(args.out)
    print(f"trained in {spent:.0f} s: {args.out}", flush=True)
    examine(checkpoint.load(args.out).to(device), args)


if __name__ == "__main__":
    main()
