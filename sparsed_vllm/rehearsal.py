# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Attention's kernels, compiled at the engine's start rather than in a request's steps."""

from types import SimpleNamespace

import torch

from sparsed_vllm.attention import SparsedImpl, sort_sequences
from sparsed_vllm.config import BLOCK_SIZES, SparseConfig, Sparsity
from sparsed_vllm.kernels import api
from sparsed_vllm.pattern import Pattern
from sparsed_vllm.phases import Phase


def rehearse(
    impl: SparsedImpl,
    config: SparseConfig,
    *,
    longest: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Record and follow a small table, and select for every length up to `longest` tokens.

    Requests with blocks of another size than the engine's, or with ids of another type, still
    compile the kernels of their own once.
    """
    pattern = Pattern(
        Sparsity(config.skip, config.select, config.block_size),
        num_prompt_tokens=config.block_size,
        num_tokens=2 * config.block_size,
        num_layers=1,
        num_heads=impl.num_heads,
        device=device,
    )
    _attend(impl, pattern, dtype)
    most = api.num_blocks(longest, min(BLOCK_SIZES))
    api.compile_selection(most, impl.num_heads, pattern.kept.dtype, device)


def _attend(impl: SparsedImpl, pattern: Pattern, dtype: torch.dtype) -> None:
    """A recording step and a sparse one, of one layer and one sequence."""
    length, device = 2 * pattern.blocks.block_size, pattern.rows.device
    layer = SimpleNamespace(layer_name="layers.0")
    heads = (impl.num_heads, impl.num_kv_heads, impl.num_kv_heads)
    # Side by side, as the projection leaves them.
    qkv = torch.zeros(length, sum(heads), impl.head_size, dtype=dtype, device=device)
    q, k, v = qkv.split(heads, dim=1)
    starts = torch.tensor([0, length], dtype=torch.int32).to(device)
    for phase in (Phase.RECORDING, Phase.SPARSE):
        metadata = sort_sequences(starts, [0, length], [(phase, pattern)])
        impl.forward(layer, q, k, v, q, metadata, torch.empty_like(q))
