# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What lm-eval wrote of each mode, as one markdown table beside the paper's numbers."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODES = ("exact", "sparse", "reused")

Row = tuple[str, str]  # a task or a group of tasks, and what is measured; for RULER the tokens

PUBLISHED: dict[str, dict[Row, tuple[float, float]]] = {
    "Dream-v0": {("ruler", "4096"): (90.1, 89.8), ("ruler", "8192"): (71.8, 72.5)},
    "LLaDA-1.5": {("ruler", "4096"): (90.5, 90.9), ("ruler", "8192"): (60.7, 62.4)},
}
"""SparseD's paper (arXiv 2509.24014), by what a checkpoint's name holds: dense and SparseD."""

NOTE = (
    "Percent; differences with their 95% intervals. Paper: SparseD, arXiv 2509.24014, of which "
    "only the RULER averages at 4k and 8k are known here; -: not known."
)


@dataclass(frozen=True)
class Results:
    """One run of lm-eval.

    values: the mean of each task's metric, in percent
    scores: what each question got, by its number, in percent
    groups: the tasks of each group that was asked for
    hashes: of each task's questions and prompts
    """

    values: dict[Row, float]
    scores: dict[Row, dict[int, float]]
    groups: dict[str, list[str]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


def read_results(folder: Path) -> dict[str, Results]:
    """The latest run of each mode that has one. Raises FileNotFoundError if none has."""
    found = {}
    for mode in MODES:
        runs = sorted((folder / mode).glob("**/results_*.json"), key=lambda path: path.name)
        if runs:
            found[mode] = read_run(runs[-1])
    if not found:
        raise FileNotFoundError(f"no results in {folder}: run without --table-only first.")
    return found


def read_run(path: Path) -> Results:
    """A results_DATE.json and the samples that lie beside it."""
    run = json.loads(path.read_text(encoding="utf-8"))
    values, scores = {}, {}
    date = path.stem.removeprefix("results_")
    for task in run["configs"]:
        samples = path.with_name(f"samples_{task}_{date}.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in samples.split("\n") if line]
        for (metric, kind), value in _metrics(run["results"][task]).items():
            row = task, metric if kind == "none" else f"{metric}, {kind}"
            values[row] = 100 * value
            scores[row] = {
                line["doc_id"]: 100 * line[metric]
                for line in lines
                if line["filter"] == kind and line.get(metric, -1) >= 0
            }
    groups = {group: _leaves(group, run["group_subtasks"]) for group in run["group_subtasks"]}
    groups = {group: tasks for group, tasks in groups.items() if tasks != [group]}
    return Results(values, scores, groups, run["task_hashes"])


def _metrics(results: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """A task's means by metric and filter.

    LongBench's tasks give each score two names, of which `score` is the one that all share; RULER's
    give a length that was not asked -1.
    """
    means = {
        tuple(key.split(",", 1)): value
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float) and value >= 0
    }
    shared = {key: value for key, value in means.items() if key[0] == "score"}
    return shared or means


def _leaves(group: str, subtasks: Mapping[str, list[str]]) -> list[str]:
    if not subtasks.get(group):
        return [group]
    return [leaf for part in subtasks[group] for leaf in _leaves(part, subtasks)]


def render(checkpoint: str, modes: Mapping[str, Results]) -> str:
    """Groups first, then tasks: percent, the difference to the first mode with its 95% interval,
    and what the paper has for this checkpoint."""
    first = next(iter(modes.values()))
    published = next((rows for name, rows in PUBLISHED.items() if name in checkpoint), {})
    heads = ["task", "", "questions", *modes, "paper: dense", "paper: SparseD"]
    lines = [heads, ["---"] * len(heads)]
    for (name, metric), tasks in _rows(first).items():
        questions = sum(len(first.scores[task, metric]) for task in tasks)
        cells = [_cell(first, run, tasks, metric) for run in modes.values()]
        paper = [f"{value:.1f}" for value in published.get((name, metric), ())] or ["-", "-"]
        lines.append([name, metric, str(questions), *cells, *paper])
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", NOTE])


def _rows(run: Results) -> dict[Row, list[str]]:
    """The tasks that each row is the mean of."""
    rows: dict[Row, list[str]] = {}
    for group, members in run.groups.items():
        for task, metric in run.values:
            if task in members:
                rows.setdefault((group, metric), []).append(task)
    return {**rows, **{row: [row[0]] for row in run.values}}


def _cell(first: Results, run: Results, tasks: Iterable[str], metric: str) -> str:
    rows = [(task, metric) for task in tasks]
    if not all(row in run.values for row in rows):
        return "-"
    value = statistics.fmean(run.values[row] for row in rows)
    if run is first:
        return f"{value:.1f}"
    difference, interval = compare(first, run, rows)
    return f"{value:.1f}, {difference:+.1f} ± {interval:.1f}"


def compare(first: Results, run: Results, rows: Iterable[Row]) -> tuple[float, float]:
    """By how much `run` is better, question by question, and half of the 95% interval.

    The mean over tasks, however many questions each has. Raises ValueError if the questions of
    the two runs are not the same.
    """
    means, variances = [], []
    for row in rows:
        if first.hashes.get(row[0]) != run.hashes.get(row[0]):
            raise ValueError(f"{row[0]}: other questions were asked. Ask all modes in one run.")
        pairs = [(score, run.scores[row][i]) for i, score in first.scores[row].items()]
        differences = [b - a for a, b in pairs]
        means.append(statistics.fmean(differences))
        spread = statistics.variance(differences) if len(differences) > 1 else math.nan
        variances.append(spread / len(differences))
    return statistics.fmean(means), 1.96 * math.sqrt(sum(variances)) / len(means)
