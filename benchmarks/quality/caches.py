# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Fast-dLLM's caches (arXiv 2505.22618) over the network in plain PyTorch, a batch at once.

A canvas is denoised block after block. The first step of a block computes the whole sequence. The
others compute the block alone (dual cache), or the block and what follows it (prefix cache), and
attend to the keys and values that all other places had at the block's first step.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from needle.batches import MASK_ID
from needle.decoding import paces
from needle.network import Network, rotary_table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Not cuDNN's: it plans anew for each shape.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
TOKENS_AT_ONCE = {"cpu": 1 << 14, "cuda": 1 << 19}


@dataclass
class Denoised:
    """What became of a batch.

    answers int64 [batch, canvas]
    steps, whole: of all its members, those that computed all tokens among them
    """

    answers: Tensor
    steps: int
    whole: int


class CachedNetwork:
    """The keys and values of every place of a batch of sequences, and what computes some anew.

    keys, values [layers, batch, heads, length, head size]
    """

    def __init__(self, network: Network, batch: int, length: int) -> None:
        shape, weight = network.shape, network.model["transformer"]["wte"].weight
        sizes = (batch, shape.n_heads, length, shape.d_model // shape.n_heads)
        self.network = network
        self.keys, self.values = weight.new_zeros(2, shape.n_layers, *sizes)
        self.turn = rotary_table(shape, length, weight.device)
        self.at_once = TOKENS_AT_ONCE[weight.device.type]

    def compute(self, tokens: Tensor, seqs: Tensor, first: int, end: int, read: slice) -> Tensor:
        """Compute places [first, end) of some sequences; returns logits of the places `read`.

        tokens int64 [batch, length];  seqs int64 [n]
        """
        parts = seqs.split(max(1, self.at_once // (end - first)))
        return torch.cat([self._compute(tokens, part, first, end, read) for part in parts])

    def _compute(self, tokens: Tensor, seqs: Tensor, first: int, end: int, read: slice) -> Tensor:
        parts = self.network.model["transformer"]
        x, turn = parts["wte"](tokens[seqs, first:end]), self.turn[:, first:end]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer, seqs, :, first:end] = k
            self.values[layer, seqs, :, first:end] = v
            keys, values = self.keys[layer, seqs], self.values[layer, seqs]
            with sdpa_kernel(ATTENTION):
                return F.scaled_dot_product_attention(q, keys, values)

        for layer, block in enumerate(parts["blocks"]):
            x = block(x, turn, attend, layer)
        return parts["ff_out"](parts["ln_f"](x[:, read.start - first : read.stop - first]))


@torch.no_grad()
def denoise_in_blocks(
    network: Network,
    prompts: Tensor,
    canvas: int,
    steps: int,
    *,
    cache: str,
    block: int | None = None,
    threshold: float | None = None,
) -> Denoised:
    """LLaDA's greedy loop.

    prompts int64 [batch, prompt];  steps: of the whole canvas
    cache: "dual", "prefix" or "none": every step computes all
    block: places, by which the canvas can be divided, and the steps by the number of blocks; None:
        the whole canvas
    threshold: fill all places that are as sure, and the surest one, instead of as many a step
    """
    batch, start = prompts.shape
    size = block or canvas
    net = CachedNetwork(network, batch, start + canvas)
    tokens = torch.cat((prompts, prompts.new_full((batch, canvas), MASK_ID)), 1)
    pace = paces(size, steps * size // canvas)
    done = Denoised(tokens[:, start:], 0, 0)
    for first in range(start, start + canvas, size):
        open_, step = tokens[:, first : first + size], 0
        while len(seqs := (open_ == MASK_ID).any(1).nonzero()[:, 0]):
            whole = step == 0 or cache == "none"
            end = first + size if cache == "dual" else start + canvas
            reach = (0, start + canvas) if whole else (first, end)
            logits = net.compute(tokens, seqs, *reach, slice(first, first + size))
            fill(open_, seqs, logits, pace[step] if threshold is None else None, threshold)
            done.steps += len(seqs)
            done.whole += whole * len(seqs)
            step += 1
    return done


def fill(
    canvas: Tensor, seqs: Tensor, logits: Tensor, pace: int | None, threshold: float | None
) -> None:
    """Fill the surest masked places of sequences `seqs` of canvas int64 [batch, places]

    logits [len(seqs), places, vocabulary];  pace: how many;  threshold: instead, how sure
    """
    logits = logits.float()
    logits[..., MASK_ID] = -torch.inf
    surest, choice = logits.softmax(-1).max(-1)
    own = canvas[seqs]
    surest = surest.masked_fill(own != MASK_ID, -1)
    count = 1 if pace is None else pace
    chosen = torch.zeros_like(own, dtype=torch.bool)
    chosen.scatter_(1, surest.topk(count, dim=1).indices, True)
    if threshold is not None:
        chosen |= surest >= threshold
    canvas[seqs] = torch.where(chosen, choice, own)
