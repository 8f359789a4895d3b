# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How many questions a network answers: prompts of one length, greedy."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from needle.batches import EOS_ID, pose
from needle.decoding import denoise
from needle.network import Network
from needle.tasks import LONG_CANVAS, that_fit

CANVAS = STEPS = 32
LONG_STEPS = 64  # of a canvas of LONG_CANVAS tokens
BATCH_TOKENS = 1 << 17  # of one forward pass, if several texts share it


@dataclass(frozen=True)
class Exam:
    """Questions of one task and length."""

    prompts: Tensor  # int64 [samples, length]
    answers: Tensor  # int64 [samples, canvas], filled up with end-of-text

    @property
    def canvas(self) -> int:
        return self.answers.shape[1]


def canvas_of(task: str) -> int:
    """The canvas on which an exam asks a task."""
    return CANVAS if task in that_fit(CANVAS) else LONG_CANVAS


def draw(task: str, length: int, samples: int, seed: int) -> Exam:
    """The same questions for the same arguments."""
    rng, canvas = random.Random(f"{task} {length} {seed}"), canvas_of(task)
    posed = [pose(rng, task, length, canvas) for _ in range(samples)]
    answers = [answer + [EOS_ID] * (canvas - len(answer)) for _, answer in posed]
    return Exam(torch.tensor([prompt for prompt, _ in posed]), torch.tensor(answers))


def evaluate(network: Network, exam: Exam, batch: int = 64) -> tuple[float, float]:
    """Share of the answers' tokens told right, and of the answers that are right as a whole."""
    device = next(network.parameters()).device
    answers, canvas = exam.answers.to(device), exam.canvas
    steps = STEPS if canvas == CANVAS else LONG_STEPS
    batch = min(batch, max(1, BATCH_TOKENS // (exam.prompts.shape[1] + canvas)))
    with torch.autocast(device.type, torch.bfloat16):
        parts = exam.prompts.to(device).split(batch)
        told = torch.cat([denoise(network, part, canvas, steps) for part in parts])
    asked = answers != EOS_ID
    right = (told == answers) & asked
    exact = (told == answers).all(1)
    return (right.sum() / asked.sum()).item(), exact.float().mean().item()
