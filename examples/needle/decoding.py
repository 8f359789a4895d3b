# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""LLaDA's greedy loop over a batch of prompts of one length, in plain PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor

from needle.batches import MASK_ID
from needle.network import Attention, full_attention


def paces(canvas: int, steps: int) -> list[int]:
    """Places that each step fills: as even as can be, the first ones take one more."""
    each, more = divmod(canvas, steps)
    return [each + (step < more) for step in range(steps)]


@torch.no_grad()
def denoise(
    network: Callable[[Tensor, slice, Attention], Tensor],
    prompts: Tensor,
    canvas: int,
    steps: int,
    attention: Callable[[int], Attention] = lambda step: full_attention,
) -> Tensor:
    """int64 [batch, prompt] -> int64 [batch, canvas].  attention: which one a step uses"""
    masks = prompts.new_full((len(prompts), canvas), MASK_ID)
    tokens, start = torch.cat((prompts, masks), 1), prompts.shape[1]
    for step, pace in enumerate(paces(canvas, steps)):
        logits = network(tokens, slice(start, None), attention(step)).float()
        logits[..., MASK_ID] = -torch.inf
        surest, choice = logits.softmax(-1).max(-1)
        answer = tokens[:, start:]
        surest = surest.masked_fill(answer != MASK_ID, -1)
        places = surest.topk(pace, dim=1).indices
        answer.scatter_(1, places, choice.gather(1, places))
    return tokens[:, start:]
