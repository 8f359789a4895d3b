# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How many questions a network answers: prompts of one length, greedy, one token a step."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from needle.batches import EOS_ID, pose
from needle.decoding import denoise
from needle.network import Network

CANVAS = STEPS = 32


@dataclass(frozen=True)
class Exam:
    """Questions of one task and length."""

    prompts: Tensor  # int64 [samples, length]
    answers: Tensor  # int64 [samples, CANVAS], filled up with end-of-text


def draw(task: str, length: int, samples: int, seed: int) -> Exam:
    """The same questions for the same arguments."""
    rng = random.Random(f"{task} {length} {seed}")
    posed = [pose(rng, task, length, CANVAS) for _ in range(samples)]
    answers = [answer + [EOS_ID] * (CANVAS - len(answer)) for _, answer in posed]
    return Exam(torch.tensor([prompt for prompt, _ in posed]), torch.tensor(answers))


def evaluate(network: Network, exam: Exam, batch: int = 64) -> tuple[float, float]:
    """Share of the answers' tokens told right, and of the answers that are right as a whole."""
    device = next(network.parameters()).device
    answers = exam.answers.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        parts = exam.prompts.to(device).split(batch)
        told = torch.cat([denoise(network, part, CANVAS, STEPS) for part in parts])
    asked = answers != EOS_ID
    right = (told == answers) & asked
    exact = (told == answers).all(1)
    return (right.sum() / asked.sum()).item(), exact.float().mean().item()
