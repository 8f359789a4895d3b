# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Questions of one length, the same for every method and every run."""

import random
from dataclasses import dataclass

from needle.batches import EOS_ID, pose
from needle.tasks import ALL_TASKS, LONG_CANVAS, TASKS, that_fit

SHORTEST, CANVASES = 96, range(16, LONG_CANVAS + 1)  # tokens, as models are trained


def tasks_of(canvas: int) -> list[str]:
    """What is asked if no tasks are named: those of short answers, or on a long canvas all."""
    return list(TASKS if canvas < LONG_CANVAS else ALL_TASKS)


def why_too_long(tasks: list[str], canvas: int) -> str | None:
    """Which answers a canvas has no room for, in one line."""
    for task in set(tasks) - set(that_fit(canvas)):
        return f"--tasks {task} needs a --canvas of {LONG_CANVAS}, got {canvas}."
    return None


@dataclass(frozen=True)
class Question:
    """A chat prompt, and the tokens of the only right answer."""

    task: str
    prompt: list[int]
    answer: list[int]


def draw(task: str, length: int, canvas: int, index: int, seed: int = 0) -> Question:
    """Question number `index`: a prompt of `length` tokens whose answer leaves the canvas room.

    seed: each has questions of its own
    """
    fresh = f" {seed}" if seed else ""
    rng = random.Random(f"{task} {length} {canvas} {index}{fresh}")
    return Question(task, *pose(rng, task, length, canvas))


@dataclass(frozen=True)
class Mark:
    """How right one answer is: the share of its tokens, and whether its text is the right one."""

    tokens: float
    exact: bool


def mark(question: Question, given: list[int]) -> Mark:
    """given: the canvas, or its tokens up to the end of the text"""
    end = given.index(EOS_ID) if EOS_ID in given else len(given)
    right = sum(a == b for a, b in zip(question.answer, given, strict=False))
    return Mark(right / len(question.answer), given[:end] == question.answer)
