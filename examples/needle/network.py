# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""LLaDA's network in plain PyTorch, for training, under the tensor names of its checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> out


@dataclass(frozen=True)
class Shape:
    """Sizes of a network, under the keys of LLaDA's config.json."""

    vocab_size: int = 1024
    n_layers: int = 8
    n_heads: int = 4
    d_model: int = 256
    mlp_hidden_size: int = 768
    max_sequence_length: int = 4608
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


def full_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every place sees every place.  q, k, v, out [batch, heads, tokens, head size]"""
    return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """One layer: attention, then a gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, mlp = shape.d_model, shape.mlp_hidden_size
        self.n_heads = shape.n_heads
        self.attn_norm = nn.RMSNorm(hidden, shape.rms_norm_eps)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (
            nn.Linear(hidden, hidden, bias=False) for _ in range(4)
        )
        self.ff_norm = nn.RMSNorm(hidden, shape.rms_norm_eps)
        self.ff_proj, self.up_proj = (nn.Linear(hidden, mlp, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(mlp, hidden, bias=False)

    def forward(self, x: Tensor, turn: Tensor, attend: Attention, layer: int) -> Tensor:
        """x [batch, tokens, hidden] -> the same;  turn: see rotary_table"""
        y = self.attn_norm(x)
        q, k, v = (self._heads(p(y)) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = attend(layer, rotate(q, turn), rotate(k, turn), v)
        x = x + self.attn_out(out.transpose(1, 2).flatten(2))
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class Network(nn.Module):
    """Predicts every masked token from the whole text around it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(shape.vocab_size, shape.d_model),
                "blocks": nn.ModuleList(Block(shape) for _ in range(shape.n_layers)),
                "ln_f": nn.RMSNorm(shape.d_model, shape.rms_norm_eps),
                "ff_out": nn.Linear(shape.d_model, shape.vocab_size, bias=False),
            }
        )
        self.model = nn.ModuleDict({"transformer": transformer})
        self._draw()

    def _draw(self) -> None:
        """Small matrices; those that write into the residual stream smaller with the depth."""
        depth = (2 * self.shape.n_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes = ".blocks." in name and name.split(".")[-2] in ("attn_out", "ff_out")
                nn.init.normal_(weight, std=0.04 * (depth if writes else 1))

    def forward(
        self, tokens: Tensor, rows: Tensor | slice = slice(None), attend: Attention = full_attention
    ) -> Tensor:
        """tokens int64 [batch, tokens] -> logits of the places `rows`, [batch, rows, vocabulary]"""
        parts = self.model["transformer"]
        x = parts["wte"](tokens)
        turn = rotary_table(self.shape, tokens.shape[1], tokens.device)
        for layer, block in enumerate(parts["blocks"]):
            x = block(x, turn, attend, layer)
        return parts["ff_out"](parts["ln_f"](x[:, rows]))


def rotary_table(shape: Shape, length: int, device: torch.device) -> Tensor:
    """Cosine and sine of each place and frequency, float32 [2, tokens, head size / 2]."""
    size = shape.d_model // shape.n_heads
    steps = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
    angles = torch.outer(torch.arange(length, device=device).float(), shape.rope_theta**-steps)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding in its half-split form, in float32 as LLaDA's rope_full_precision asks."""
    cos, sin = turn
    low, high = x.float().chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)
