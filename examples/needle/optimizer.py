# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Muon for the matrices of the blocks, AdamW for the rest; a step can be captured in a graph."""

import torch
from torch import Tensor, nn


class Muon:
    """Momentum whose every matrix is made orthogonal before it is applied (Jordan et al., 2024).

    Matrices of one size are stacked, so that a step takes a few kernels only.
    rate: a float32 scalar on the device, read at each step.
    """

    def __init__(self, matrices: list[nn.Parameter], rate: Tensor, momentum: float = 0.95) -> None:
        self.rate, self.momentum = rate, momentum
        self.stacks: list[list[nn.Parameter]] = [
            [m for m in matrices if m.shape == shape] for shape in {m.shape: None for m in matrices}
        ]
        self.averages = [torch.zeros_like(torch.stack(list(stack))) for stack in self.stacks]

    @torch.no_grad()
    def step(self) -> None:
        for stack, average in zip(self.stacks, self.averages, strict=True):
            grads = torch.stack([matrix.grad for matrix in stack])
            average.lerp_(grads, 1 - self.momentum)
            update = orthogonal(grads.lerp(average, self.momentum))
            rows, columns = update.shape[1:]
            update = update * (self.rate * -(max(1, rows / columns) ** 0.5))
            torch._foreach_add_(stack, list(update.unbind()))


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: five Newton-Schulz steps in bfloat16.

    [stack, rows, columns] -> the same;  coefficients of Jordan et al., 2024
    """
    x = matrices.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).float()
