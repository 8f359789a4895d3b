# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What requests have cost so far, as the scheduler counts it: for metrics and the log."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from sparsed_vllm.config import Sparsity
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.phases import Phase, Schedule, phase_of, recording_step, resume_step


class TableCount(NamedTuple):
    """One recorded table, over all layers, heads and query blocks of one rank.

    kept, possible: key blocks that it lists, and that dense attention would read
    num_bytes: of device memory
    """

    kept: int
    possible: int
    num_bytes: int


@dataclass
class Progress:
    """How far one request is, and what it has cost, preempted work included.

    reason: why it runs sparse or dense: `length`, `request`, `backend` or `steps`
    step: the one it takes next;  steps: how many it took, by phase
    num_final: places handed out;  table: its own since its recording step was heard of
    """

    params: DenoisingParams
    sparsity: Sparsity | None
    reason: str
    schedule: Schedule
    step: int = 0
    num_final: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    table: TableCount | None = None

    @classmethod
    def of(cls, params: DenoisingParams, sparsity: Sparsity | None, reason: str) -> "Progress":
        schedule = Schedule.of(params)
        if sparsity and recording_step(params.steps, sparsity.skip) >= schedule.num_steps:
            reason = "steps"
        return cls(params, sparsity, reason, schedule)

    @property
    def attention(self) -> str:
        """`sparse` if the request comes to record a table."""
        return "sparse" if self.sparsity and self.reason != "steps" else "dense"

    @property
    def steps_left(self) -> int:
        return self.schedule.num_steps - self.step

    @property
    def phase(self) -> Phase:
        """How its next step attends."""
        if self.sparsity is None:
            return Phase.DENSE
        return phase_of(self.step, self.params.steps, self.sparsity.skip)

    def start(self) -> None:
        """It starts or, after a preemption, goes on; its table is gone with its pages."""
        self.step = resume_step(self.schedule, self.num_final, self.sparsity is not None)
        self.table = None

    def note_table(self, table: TableCount) -> None:
        """Take the count of its table, unless that comes from before a preemption."""
        if self.sparsity and self.step > recording_step(self.params.steps, self.sparsity.skip):
            self.table = table

    def summary(self) -> dict[str, object]:
        """The request's costs by name, for its line in the log."""
        steps = {f"steps_{phase.value}": self.steps[phase.value] for phase in Phase}
        costs = {**steps, "attention": self.attention, "reason": self.reason}
        if self.table is None:
            return costs
        kept, possible, num_bytes = self.table
        density = f"{kept / possible:.4f}"
        blocks = {"kept_blocks": kept, "possible_blocks": possible, "density": density}
        return {**costs, **blocks, "table_bytes": num_bytes}


class Tally:
    """What an engine's requests have cost since it was last reported.

    counts: by the keys of metrics.py, such as `steps/dense`
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def admit(self, progress: Progress) -> None:
        self.counts[f"requests/{progress.attention}/{progress.reason}"] += 1

    def take_step(self, progress: Progress) -> None:
        """Count the request's next step, which is on its way to the workers."""
        block, _ = progress.schedule.locate(progress.step)
        self.counts["denoising_steps"] += 1
        self.counts["canvas_positions"] += block.size
        self.counts[f"steps/{progress.phase.value}"] += 1
        progress.steps[progress.phase.value] += 1
        progress.step += 1

    def hand_out(self, progress: Progress, num_tokens: int) -> None:
        """Count places that will not change any more."""
        self.counts["committed_tokens"] += num_tokens
        progress.num_final += num_tokens

    def stop(self, progress: Progress) -> None:
        """Count a request that EOS or a stop token ended, if that spared it a block."""
        self.counts["early_stops"] += progress.num_final < progress.params.num_tokens

    def record(self, table: TableCount) -> None:
        self.counts["tables"] += 1
        self.counts["kept_blocks"] += table.kept
        self.counts["possible_blocks"] += table.possible

    def take(self) -> dict[str, int]:
        """All counts, which start again at zero."""
        taken, self.counts = dict(self.counts), Counter()
        return taken
