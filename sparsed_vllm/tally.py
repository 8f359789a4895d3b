# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What requests have cost so far, as the scheduler counts it: for metrics and the log."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from sparsed_vllm.steps import Cursor, Phase, Plan, Source, Step


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
    cursor: the step it takes next;  steps: how many it took, by phase;  num_light: light ones
    num_rows: tokens that its steps computed;  num_chosen: of these, context that the device chose
    num_final: places handed out;  table: the last that it is known to have recorded
    """

    cursor: Cursor
    reason: str
    num_final: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    num_light: int = 0
    num_rows: int = 0
    num_chosen: int = 0
    table: TableCount | None = None

    @classmethod
    def of(cls, plan: Plan, reason: str) -> "Progress":
        has_too_few = plan.sparsity is not None and plan.recording_step is None
        return cls(Cursor(plan), "steps" if has_too_few else reason)

    @property
    def plan(self) -> Plan:
        return self.cursor.plan

    @property
    def attention(self) -> str:
        """`sparse` if the request comes to record a table."""
        return "dense" if self.plan.recording_step is None else "sparse"

    @property
    def reuse(self) -> str:
        """`on` if the request reuses keys and values between steps."""
        return "off" if self.plan.reuse is None else "on"

    @property
    def steps_left(self) -> int:
        return self.cursor.steps_left

    @property
    def passes(self) -> float:
        """How often its sequence was computed, in whole sequences."""
        return self.num_rows / self.plan.length

    def start(self) -> None:
        """It starts or, after a preemption, goes on; its table is gone with its pages."""
        self.cursor.restart(self.num_final)
        self.table = None

    def take_step(self) -> Step:
        """Count its next step, and return it."""
        step = self.cursor.advance()
        self.steps[step.phase.value] += 1
        self.num_light += step.source is Source.PAGES
        self.num_rows += step.num_rows
        self.num_chosen += step.num_chosen
        return step

    def note_table(self, table: TableCount) -> None:
        """Take the count of its table, unless that comes from before a preemption."""
        recorded = self.plan.recording_step
        if recorded is not None and self.cursor.step > recorded:
            self.table = table

    def summary(self) -> dict[str, object]:
        """The request's costs by name, for its line in the log."""
        steps = {f"steps_{phase.value}": self.steps[phase.value] for phase in Phase}
        costs = {**steps, "attention": self.attention, "reason": self.reason, "reuse": self.reuse}
        costs |= {"steps_light": self.num_light, "rows": self.num_rows, "chosen": self.num_chosen}
        costs["passes"] = f"{self.passes:.2f}"
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
        self.counts: defaultdict[str, float] = defaultdict(int)

    def admit(self, progress: Progress) -> None:
        self.counts[f"requests/{progress.attention}/{progress.reason}"] += 1
        self.counts[f"requests_by_reuse/{progress.reuse}"] += 1

    def take_step(self, progress: Progress) -> None:
        """Count the request's next step, which is on its way to the workers."""
        step, length = progress.take_step(), progress.plan.length
        self.counts["denoising_steps"] += 1
        self.counts["canvas_positions"] += step.block.size
        self.counts[f"steps/{step.phase.value}"] += 1
        self.counts[f"steps_by_source/{step.source.value}"] += 1
        self.counts["computed_rows"] += step.num_rows
        self.counts["possible_rows"] += length
        self.counts["chosen_tokens"] += step.num_chosen
        self.counts["passes"] += step.num_rows / length

    def hand_out(self, progress: Progress, num_tokens: int) -> None:
        """Count places that will not change any more."""
        self.counts["committed_tokens"] += num_tokens
        progress.num_final += num_tokens

    def stop(self, progress: Progress) -> None:
        """Count a request that EOS or a stop token ended, if that spared it a block."""
        self.counts["early_stops"] += progress.num_final < progress.plan.params.num_tokens

    def record(self, table: TableCount) -> None:
        self.counts["tables"] += 1
        self.counts["kept_blocks"] += table.kept
        self.counts["possible_blocks"] += table.possible

    def take(self) -> dict[str, float]:
        """All counts, which start again at zero."""
        taken = dict(self.counts)
        self.counts.clear()
        return taken
