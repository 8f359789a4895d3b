# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Questions of one length, the same for every method and every run."""

import random
from dataclasses import dataclass

from needle.batches import EOS_ID, pose

SHORTEST, CANVASES = 96, range(16, 65)  # tokens, as the model is trained


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
