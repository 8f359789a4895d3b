# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Seconds of the steps of a loop over blocks, and of the generation that they add up to."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from generation.machine import wait

Loop = Callable[..., Any]
"""(model, prompt [1, n], steps, gen_length), as in all descendants of LLaDA's generate.py"""


@dataclass(frozen=True)
class Load:
    """One generation.

    length: tokens of prompt and canvas;  steps: T, of all blocks together
    """

    length: int
    new_tokens: int
    block_length: int
    steps: int

    @property
    def blocks(self) -> int:
        return self.new_tokens // self.block_length

    @property
    def steps_a_block(self) -> int:
        return self.steps // self.blocks

    def tokens(self, device: str) -> torch.Tensor:
        """[1, length], as in other benchmarks; no mask among them"""
        return torch.arange(self.length, device=device)[None] % 250


@dataclass(frozen=True)
class Step:
    """rows: tokens that the model computed;  seconds: until the next step, choice and all"""

    rows: int
    seconds: float


class Enough(Exception):
    """Ends a loop that has no such end of its own."""


class Clocked:
    """A model that notes when each step of a loop begins, and lets it take no more than `limit`."""

    def __init__(self, model: Any, limit: int | None) -> None:
        self.model, self.limit = model, limit
        self.device, self.config = model.device, model.config
        self.rows: list[int] = []
        self.begins: list[float] = []

    def __call__(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(self.rows) == self.limit:
            raise Enough
        self._note_time()
        self.rows.append(tokens.shape[1])
        return self.model(tokens, *args, **kwargs)

    def steps(self) -> list[Step]:
        """All of them, the last of which ends now."""
        self._note_time()
        pairs = zip(self.begins, self.begins[1:], strict=False)
        seconds = [end - begin for begin, end in pairs]
        return [Step(*step) for step in zip(self.rows, seconds, strict=True)]

    def _note_time(self) -> None:
        wait()  # costs nothing: these loops wait for each step, to see which places it filled
        self.begins.append(time.perf_counter())


def time_steps(
    loop: Loop, model: Any, tokens: torch.Tensor, canvas: int, steps: int, limit: int | None = None
) -> list[Step]:
    """tokens [1, length], the last `canvas` of which are to be filled"""
    clocked = Clocked(model, limit)
    with suppress(Enough):
        loop(clocked, tokens[:, : tokens.shape[1] - canvas], steps=steps, gen_length=canvas)
    return clocked.steps()


def run_whole(loop: Loop, model: Any, load: Load) -> dict[str, Any]:
    """Of a generation, each of whose shapes was run before."""
    tokens = load.tokens(model.device)
    time_steps(loop, model, tokens, load.new_tokens, load.steps, limit=4)
    steps = time_steps(loop, model, tokens, load.new_tokens, load.steps)
    assert len(steps) == load.steps, f"{len(steps)} steps, not {load.steps}"
    whole, light = parted(steps, load.length)
    seconds = sum(step.seconds for step in steps)
    return {"seconds": seconds, "projected": False, **kinds(fmean(whole), median(light))}


def project(loop: Loop, model: Any, load: Load, light_steps: int) -> dict[str, Any]:
    """The same, added up from the first and the last block.

    Rows of a light step decrease from block to block by as many, or not at all, so those of all
    blocks take as much as the mean of these two. Of whole steps the faster counts, which are alike.
    """
    tokens = load.tokens(model.device)
    canvases = load.new_tokens, load.block_length
    whole, light = [], []
    for canvas in canvases:
        steps = load.steps_a_block * canvas // load.block_length
        # Loops compute one or two whole steps a block.
        found = time_steps(loop, model, tokens, canvas, steps, limit=2 + light_steps)
        wholes, lights = parted(found, load.length)
        whole.append(wholes)
        light.append(median(lights))
    num_whole, fastest = len(whole[0]), min(whole, key=sum)
    rest = (load.steps_a_block - num_whole) * fmean(light)
    seconds = load.blocks * (sum(fastest) + rest)
    return {"seconds": seconds, "projected": True, **kinds(fmean(fastest), fmean(light))}


def parted(steps: list[Step], length: int) -> tuple[list[float], list[float]]:
    """Seconds of whole and of light steps."""
    whole = [step.seconds for step in steps if step.rows == length]
    return whole, [step.seconds for step in steps if step.rows < length]


def kinds(whole: float, light: float) -> dict[str, float]:
    return {"whole_step": round(whole, 5), "light_step": round(light, 5)}
