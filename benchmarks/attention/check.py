# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Is what a kernel returns attention? A few tiles of its result against float64."""

from itertools import product

import torch
from torch import Tensor

from attention.cases import BLOCK, Case


def fault(out: Tensor, case: Case, *, lists: bool) -> str | None:
    """What is wrong with a result, None if nothing is.

    out [length, heads, head_dim];  lists: it attends to the listed blocks, not to all
    A kernel may err twice what the same arithmetic errs in torch, and a rounding step.
    """
    if out.shape != case.qkv[0].shape:
        return f"its shape is {tuple(out.shape)}"
    errors, slips, largest = [], [], []
    for head, block in tiles(case):
        exact = attend(case, head, block, lists, torch.float64)
        actual = out[block * BLOCK :, head][: len(exact)].double()
        twin = attend(case, head, block, lists, out.dtype).double()
        errors.append((actual - exact).abs().max())
        slips.append((twin - exact).abs().max())
        largest.append(exact.abs().max())
    error, slip, most = (torch.stack(x).max().item() for x in (errors, slips, largest))
    allowed = 2 * slip + torch.finfo(out.dtype).eps * most
    return None if error <= allowed else f"it is off by {error:.2e}, allowed {allowed:.2e}"


def tiles(case: Case) -> list[tuple[int, int]]:
    """Heads and query blocks at either end and between."""
    heads, blocks = case.num_heads, case.num_blocks
    return list(product(*(sorted({0, n // 2, n - 1}) for n in (heads, blocks))))


def attend(case: Case, head: int, block: int, lists: bool, dtype: torch.dtype) -> Tensor:
    """One tile of queries; float64, or float32 with the weights and the result in `dtype`.

    Returns [rows, head_dim], without the text's last row: not all that is called dense sees every
    key there.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    rows = slice(block * BLOCK, min((block + 1) * BLOCK, case.length - 1))
    keys = places(case, head, block) if lists else slice(None)
    q = case.qkv[0][rows, head].to(exact)
    k, v = (x[keys, head // case.group].to(exact) for x in case.qkv[1:])
    weights = (case.scale * q @ k.T).softmax(-1)
    return (weights.to(dtype).to(exact) @ v).to(dtype)


def places(case: Case, head: int, block: int) -> Tensor:
    """Tokens of the blocks that one list names."""
    ids = case.ids[head, block, : int(case.counts[head, block])].long()
    size = case.block_size
    return (ids[:, None] * size + torch.arange(size, device=ids.device)).flatten()
