# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A few query rows beside the pages that hold their sequences' keys, for the kernel tests."""

from dataclasses import dataclass, fields, replace

import torch
from kernel_cases import NAN, layout_of, others, scattered
from torch import Tensor

from sparsed_vllm.kernels.layout import (
    KEY_LEN,
    PAGE,
    PAGE_ROW,
    BatchLayout,
    num_blocks,
)


@dataclass(frozen=True)
class Case:
    """The arguments of token_mass, on the CPU; rows of weight 0 and of no sequence are NaN."""

    q: Tensor
    keys: Tensor
    lse: Tensor
    layout: BatchLayout
    pages: Tensor
    weights: Tensor
    slots: Tensor
    mass: Tensor
    scale: float

    def only(self, places):
        """These sequences alone, in this order, amid what the others left."""
        layout = layout_of(self.layout.tile, self.layout.host[:, places], "cpu")
        return replace(self, layout=layout, slots=self.slots[places])

    def on(self, device):
        """Copies as keyword arguments, with the strides that these have."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        layout = replace(self.layout, columns=self.layout.columns.to(device))
        tensors = {name: copy(x, device) for name, x in given.items() if isinstance(x, Tensor)}
        return given | tensors | {"layout": layout}


def copy(x, device):
    """With the strides of x, which .to() does not keep."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def make_case(
    sizes,
    *,
    heads=(2, 1),
    head_dim=32,
    dtype=torch.float32,
    tile=64,
    spread=1.0,
    counted=0.7,
):
    """sizes: (tokens, rows) of each sequence;  counted: the odds that a row's weight is not 0"""
    key_lens, num_rows = ([x[i] for x in sizes] for i in (0, 1))
    starts, size = scattered(num_rows)
    layout = BatchLayout.of(
        tile,
        "cpu",
        query_starts=starts,
        num_rows=num_rows,
        first_rows=[0] * len(sizes),
        key_starts=[0] * len(sizes),
        key_lens=key_lens,
        page_rows=torch.randperm(len(sizes) + 1)[: len(sizes)],
    )
    weights = torch.rand(size) * (torch.rand(size) < counted)
    inside = torch.cat([torch.empty(0, dtype=torch.long), *_rows_of(layout)])
    weights[others(inside, size)] = NAN
    q = (spread * torch.randn(size, heads[0] + 1, head_dim)).to(dtype)[:, 1:]
    q[~(weights > 0)] = NAN
    keys, pages = paged_keys(layout, heads[1], head_dim, dtype)
    slots = torch.randperm(len(sizes) + 2)[: len(sizes)]
    mass = torch.rand(len(sizes) + 2, max(key_lens, default=0) + 5)
    case = Case(q, keys, NAN * mass, layout, pages, weights, slots, mass, head_dim**-0.5)
    return replace(case, lse=lse_of(case))


def _rows_of(layout):
    return [torch.arange(x.queries.start, x.queries.stop) for _, x in layout.sequences()]


def paged_keys(layout, num_heads, head_dim, dtype):
    """As vLLM keeps them, heads before tokens and values beside keys; NaN where no token is."""
    counts = [num_blocks(length, PAGE) for length in layout.host[KEY_LEN].tolist()]
    pages = torch.full((layout.num_page_rows + 1, max(counts, default=0) + 1), 10**9)
    pool = torch.full((sum(counts) + 2, num_heads, PAGE, 2 * head_dim), NAN)
    free = torch.randperm(sum(counts) + 2).split([*counts, 2])
    for column, own in zip(layout.host.T.tolist(), free, strict=False):
        length, row = column[KEY_LEN], column[PAGE_ROW]
        pages[row, : len(own)] = own
        tokens = torch.randn(num_heads, len(own) * PAGE, head_dim)
        tokens[:, length:] = NAN
        pool[own, :, :, :head_dim] = tokens.unflatten(1, (-1, PAGE)).transpose(0, 1)
    return pool.to(dtype).transpose(1, 2)[..., :head_dim], pages.int()


def logits_of(case, sequence):
    """Float64 [num_heads, rows, tokens]"""
    own = case.pages[sequence.page_row, : num_blocks(sequence.key_len, PAGE)].long()
    k = case.keys[own].flatten(0, 1)[: sequence.key_len].double()
    q = case.q[sequence.queries].double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return case.scale * torch.einsum("qhd,khd->hqk", q, k)


def lse_of(case):
    """Float32 [num_heads, rows], in memory where a row's heads lie side by side."""
    lse = torch.full((case.q.shape[0], case.q.shape[1] + 3), NAN)[:, 1:-2].T
    for _, sequence in case.layout.sequences():
        lse[:, sequence.queries] = logits_of(case, sequence).logsumexp(-1).float()
    return lse
