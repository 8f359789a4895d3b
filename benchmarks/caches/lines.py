# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Arguments and lines that the benchmarks of other people's loops have in common."""

import argparse
import gc
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from budget import note
from generation.machine import device_name, forget_peak, guarded, peak_bytes

from caches.clock import Load, Loop, project, run_whole

FITS = 16384
"""Tokens up to which 80 GB hold all that these loops keep of LLaDA-8B; beyond, they are patched"""

# Load -> a loop, its model, and what was changed of them to fit; undone when it closes.
Prepared = Callable[[Load], AbstractContextManager[tuple[Loop, Any, list[str]]]]


def parser(description: str | None, modes: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkout", type=Path, required=True, help="folder of their repository")
    add("--lengths", type=int, nargs="+", default=[1024, 8192, 32768, 65536])
    add("--new-tokens", type=int, default=128)
    add("--steps", type=int, default=128, help="T of a generation")
    add("--block-length", type=int, default=32)
    add("--modes", nargs="+", choices=modes, default=modes)
    add("--whole-up-to", type=int, default=8192, help="tokens; longer ones are added up")
    add("--light-steps", type=int, default=8, help="timed of a block, where they are added up")
    add("--config", type=json.loads, default={}, help="fields of their config, not LLaDA-8B's")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    blocks, rest = divmod(args.new_tokens, args.block_length)
    if rest or args.steps % max(blocks, 1) or args.steps < 4 * blocks:
        limits = f"a multiple of --block-length {args.block_length}, and --steps one of the blocks"
        parser.error(f"--new-tokens must be {limits}, 4 a block at least.")
    if min(args.lengths) <= args.new_tokens:
        parser.error(f"--lengths must exceed --new-tokens {args.new_tokens}.")


def measure(engine: str, args: argparse.Namespace, modes: dict[str, Prepared]) -> None:
    """A line for each length and mode, the kernels of all modes compiled before."""
    for length, (mode, prepared) in ((n, item) for n in (256, 384, 640) for item in modes.items()):
        note(f"warms up: {mode}, {length} tokens")
        with prepared(Load(length, 128, 32, 16)) as (loop, model, _):
            run_whole(partial(loop, block_length=32), model, Load(length, 128, 32, 16))
    for length in args.lengths:
        load = Load(length, args.new_tokens, args.block_length, args.steps)
        for mode, prepared in modes.items():
            guarded(partial(report, engine, args, mode, prepared, load), length)


def report(
    engine: str, args: argparse.Namespace, mode: str, prepared: Prepared, load: Load
) -> None:
    gc.collect()
    forget_peak()
    with prepared(load) as (loop, model, patched):
        loop = partial(loop, block_length=load.block_length)
        if load.length <= args.whole_up_to:
            numbers = run_whole(loop, model, load)
        else:
            numbers = project(loop, model, load, args.light_steps)
    line = {
        "bench": "generate_reuse",
        "model": "llada",
        "device": device_name(),
        "torch": torch.__version__,
        "checkout": args.checkout.resolve().name,
        "config": args.config,
        "mode": mode,
        "tokens": load.length,
        "new_tokens": load.new_tokens,
        "steps": load.steps,
        "block_length": load.block_length,
        "batch": 1,
        "share": None,
        "engine": engine,
        **numbers,
        "patched": patched,
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(line), flush=True)
