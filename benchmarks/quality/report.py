# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What was measured, as JSON lines and as tables to read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from quality.intervals import Mean, average, mean
from quality.methods import DENSE, method_of
from quality.questions import Mark

AVERAGE = "average"


@dataclass
class Cell:
    """The marks of one method for one task and length, question by question."""

    marks: list[Mark] = field(default_factory=list)

    def tokens(self) -> Mean:
        return mean([mark.tokens for mark in self.marks])

    def exact(self) -> Mean:
        return mean([float(mark.exact) for mark in self.marks])

    def gain(self, dense: "Cell") -> tuple[Mean, Mean]:
        """Tokens and exact answers against dense attention's, question by question."""
        pairs = list(zip(self.marks, dense.marks, strict=True))
        return (
            mean([a.tokens - b.tokens for a, b in pairs]),
            mean([float(a.exact) - float(b.exact) for a, b in pairs]),
        )


@dataclass
class Results:
    """cells and densities of the sparse steps: by length and method, cells by task below it."""

    cells: dict[tuple[int, str], dict[str, Cell]] = field(default_factory=dict)
    densities: dict[tuple[int, str], float | None] = field(default_factory=dict)
    seconds: dict[tuple[int, str], float] = field(default_factory=dict)

    def add(self, length: int, method: str, task: str, mark: Mark) -> None:
        tasks = self.cells.setdefault((length, method), {})
        tasks.setdefault(task, Cell()).marks.append(mark)

    def lines(self) -> Iterator[dict[str, Any]]:
        """One line for each method, length and task, and one for the average of the tasks."""
        for (length, method), tasks in self.cells.items():
            key = {"method": method, "length": length, "density": self.densities[length, method]}
            if own := method_of(method).block_size:
                key["block_size"] = own
            if own := method_of(method).query_block_size:
                key["query_block_size"] = own
            rows = {task: self._means(length, task, cell) for task, cell in tasks.items()}
            for task, row in rows.items():
                yield {**key, "task": task, "samples": len(tasks[task].marks), **flat(row)}
            averages = {name: average([row[name] for row in rows.values()]) for name in _NAMES}
            count = sum(len(cell.marks) for cell in tasks.values())
            seconds = round(self.seconds[length, method], 2)
            line = {**key, "task": AVERAGE, "samples": count, **flat(averages)}
            yield {**line, "seconds": seconds}

    def _means(self, length: int, task: str, cell: Cell) -> dict[str, Mean]:
        dense = self.cells[length, DENSE.name][task]
        values = (cell.tokens(), cell.exact(), *cell.gain(dense))
        return dict(zip(_NAMES, values, strict=True))


_NAMES = ("tokens", "exact", "tokens_gain", "exact_gain")


def flat(means: dict[str, Mean]) -> dict[str, float]:
    """Shares in percent; `x_margin` is half of the interval of `x`."""
    flat = {}
    for name, value in means.items():
        flat[name] = round(100 * value.value, 2)
        flat[f"{name}_margin"] = round(100 * value.margin, 2)
    return flat


def tables(lines: list[dict[str, Any]]) -> str:
    """Averages over the tasks by length; then dense and SparseD by task."""
    lengths = list(dict.fromkeys(line["length"] for line in lines))
    averages = [line for line in lines if line["task"] == AVERAGE]
    parts = [_by_length(averages, lengths)]
    parts += [_by_task(lines, length) for length in lengths]
    return "\n\n".join(parts)


def _by_length(lines: list[dict[str, Any]], lengths: list[int]) -> str:
    rows = [["tokens right, %: all, against dense", *(f"{length} tokens" for length in lengths)]]
    rows += [["---"] * len(rows[0])]
    for method in dict.fromkeys(line["method"] for line in lines):
        cells = [_cell(line) for line in lines if line["method"] == method]
        rows.append([method_of(method).label, *cells])
    return _markdown(rows)


def _cell(line: dict[str, Any]) -> str:
    share = f"{line['tokens']:.1f}"
    if line["method"] == DENSE.name:
        return f"{share} ± {line['tokens_margin']:.1f}"
    gain = f"{line['tokens_gain']:+.1f} ± {line['tokens_gain_margin']:.1f}"
    kept = "" if line["density"] is None else f" ({line['density']:.0%} kept)"
    return f"{share}, {gain}{kept}"


def _by_task(lines: list[dict[str, Any]], length: int) -> str:
    lines = [line for line in lines if line["length"] == length]
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    rows = [
        [f"{length} tokens: right tokens, exact answers, %", *tasks],
        ["---"] * (len(tasks) + 1),
    ]
    for method in dict.fromkeys(line["method"] for line in lines):
        own = {line["task"]: line for line in lines if line["method"] == method}
        cells = [f"{own[task]['tokens']:.1f}, {own[task]['exact']:.1f}" for task in tasks]
        rows.append([method_of(method).label, *cells])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
