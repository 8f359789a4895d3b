# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How much the tables of a step keep, on its way from the device to the scheduler."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsed_vllm.pattern import Pattern
from sparsed_vllm.tally import TableCount


class RecordedTables:
    """Counts of the tables that one step recorded.

    How many blocks a table keeps is known on the device alone, and nobody may wait for it. So the
    counts travel as vLLM's sampling masks do, which no engine of ours has: copied to the host
    beside the step's tokens, and read when those are.

    kept int64 [num_tables]: listed key blocks, in the order of `tables`
    """

    def __init__(self, tables: Mapping[str, Pattern], kept: Tensor | None = None) -> None:
        self.tables = tables
        if kept is None:
            kept = torch.stack([pattern.num_kept.sum() for pattern in tables.values()])
        self.kept = kept

    def to_cpu_nonblocking(self) -> "RecordedTables":
        return RecordedTables(self.tables, self.kept.to("cpu", non_blocking=True))

    def tolists(self, *_: Any) -> dict[str, TableCount]:
        """The count of each request's table; called once the copy has arrived."""
        kept = self.kept.tolist()
        return {
            req_id: TableCount(count, pattern.num_possible, pattern.num_bytes)
            for (req_id, pattern), count in zip(self.tables.items(), kept, strict=True)
        }
