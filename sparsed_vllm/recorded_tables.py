# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How much the tables of a step keep, on its way from the device to the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsed_vllm.batch import DenoisingBatch
from sparsed_vllm.kernels.layout import PAGE, num_blocks, places_within, send
from sparsed_vllm.tally import TableCount

if TYPE_CHECKING:
    from sparsed_vllm.attention import SparsedImpl


class RecordedTables:
    """Counts of the tables that one step recorded.

    How many blocks a table keeps is known on the device alone, and the host does not wait for it.
    So the counts travel as vLLM's sampling masks do, which no engine of ours has: copied to the
    host beside the step's tokens, and read when those are.

    sizes: (request, ids it could list, bytes of its pages) of each table
    kept int64 [num_tables]: listed key blocks, in the same order
    """

    def __init__(self, sizes: Sequence[tuple[str, int, int]], kept: Tensor) -> None:
        self.sizes = sizes
        self.kept = kept

    @classmethod
    def of(
        cls, batch: DenoisingBatch, pages: Tensor, layers: Sequence[tuple[SparsedImpl, Tensor]]
    ) -> RecordedTables:
        """The tables that `batch` recorded.

        pages: vLLM's page table;  layers: each one's implementation and cache
        """
        recording = batch.recording
        kept = torch.zeros(len(recording), dtype=torch.int64, device=pages.device)
        share = sum(impl.pages.tables.bytes_per_token for impl, _ in layers)
        heads = sum(impl.num_heads for impl, _ in layers)
        by_size: dict[int, list[int]] = {}
        sizes = []
        for place, i in enumerate(recording):
            plan = batch.plans[i]
            assert plan.sparsity is not None
            by_size.setdefault(plan.sparsity.tile, []).append(place)
            rows = num_blocks(plan.length, plan.sparsity.tile)
            possible = heads * rows * num_blocks(plan.length, plan.sparsity.block_size)
            num_bytes = num_blocks(plan.length, PAGE) * PAGE * share
            sizes.append((batch.req_ids[i], possible, num_bytes))
        for size, places in by_size.items():
            seqs = np.array([recording[place] for place in places])
            counts = np.array([num_blocks(batch.plans[i].length, size) for i in seqs])
            owners = np.repeat(places, counts)
            within = places_within(counts)
            columns = send(np.stack([owners, np.repeat(seqs, counts), within]), pages.device)
            kept.index_add_(0, columns[0], _count(columns[1], columns[2], size, pages, layers))
        return cls(sizes, kept)

    def to_cpu_nonblocking(self) -> RecordedTables:
        return RecordedTables(self.sizes, self.kept.to("cpu", non_blocking=True))

    def tolists(self, *_: Any) -> dict[str, TableCount]:
        """The count of each request's table; called once the copy has arrived."""
        return {
            req_id: TableCount(count, possible, num_bytes)
            for (req_id, possible, num_bytes), count in zip(
                self.sizes, self.kept.tolist(), strict=True
            )
        }


def _count(
    seqs: Tensor,
    blocks: Tensor,
    size: int,
    pages: Tensor,
    layers: Sequence[tuple[SparsedImpl, Tensor]],
) -> Tensor:
    """How many ids the rows of some query blocks list, over all heads and layers; int64 [n].

    seqs, blocks int64 [n]: the blocks' sequences, and their places in these
    size: tokens of a query block
    """
    per_page = PAGE // size
    rows = pages[seqs, blocks // per_page].long(), blocks % per_page
    total = torch.zeros_like(seqs)
    for impl, cache in layers:
        total += impl.tables_of(cache, pages, size).num_kept[rows].sum(-1)
    return total
