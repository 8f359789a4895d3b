# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The marks of answers question by question, kept in a file so that a run can go on later."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quality.questions import Mark
from quality.report import Cell, flat

COSTS = ("steps", "passes", "seconds", "density")


@dataclass
class Answered:
    """What became of questions that one method was asked.

    cell: their marks;  steps, passes: summed over the questions;  seconds: of all together
    density: share of key blocks that sparse steps read, where it is known
    """

    cell: Cell = field(default_factory=Cell)
    steps: float = 0
    passes: float = 0
    seconds: float = 0
    density: float | None = None

    def __add__(self, other: "Answered") -> "Answered":
        return Answered(
            Cell(self.cell.marks + other.cell.marks),
            self.steps + other.steps,
            self.passes + other.passes,
            self.seconds + other.seconds,
        )

    def line(self, dense: "Answered") -> dict[str, Any]:
        """What a result says; dense: of the same questions"""
        tokens_gain, exact_gain = self.cell.gain(dense.cell)
        count = len(self.cell.marks)
        return {
            "questions": count,
            **flat({"tokens": self.cell.tokens(), "exact": self.cell.exact()}),
            **flat({"tokens_gain": tokens_gain, "exact_gain": exact_gain}),
            "passes": round(self.passes / count, 3),
            "steps": round(self.steps / count, 2),
            "seconds": round(self.seconds, 1),
        }


class MarkFile:
    """JSON lines of what was answered, each under the settings of its run; None: kept nowhere."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, Answered] = {}
        if path is not None and path.exists():
            for line in map(json.loads, path.read_text().splitlines()):
                marks = [Mark(tokens, exact) for tokens, exact in line.pop("marks")]
                costs = [line.get(name) for name in COSTS]
                self.known[_key(line["of"])] = Answered(Cell(marks), *costs)

    def get(self, of: dict[str, Any]) -> Answered | None:
        """of: the settings"""
        return self.known.get(_key(of))

    def add(self, of: dict[str, Any], answered: Answered) -> None:
        self.known[_key(of)] = answered
        if self.path is None:
            return
        marks = [(mark.tokens, mark.exact) for mark in answered.cell.marks]
        costs = {name: getattr(answered, name) for name in COSTS}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"of": of, **costs, "marks": marks}) + "\n")


def _key(of: dict[str, Any]) -> str:
    return json.dumps(of, sort_keys=True)
