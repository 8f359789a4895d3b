# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Draws seconds a generation over the context's length, as SparseD's figure 4, with its numbers.

    pip install matplotlib
    cd benchmarks/results
    python ../plot_generate.py generate.jsonl reference.jsonl ../../docs/latency.png

Lines of bench_generate.py and bench_reference.py; of those that say the same, the last counts.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import figures

PAPER = {  # arXiv 2509.24014, figure 4: LLaDA-1.5, T = 128, on an A800; thousands of tokens
    "dense": {4: 38.0, 16: 245.0, 32: 690.0, 64: 2127.0},
    "sparse": {4: 41.0, 16: 230.0, 32: 596.0, 64: 1695.0},
}

Curves = dict[str, dict[int, float]]  # label -> tokens -> seconds


def curves_of(lines: list[dict], model: str, steps: int) -> Curves:
    """Generations of single requests of 128 tokens, and the paper's where it has them."""
    curves: Curves = defaultdict(dict)
    if model == "llada" and steps == 128:
        for mode, points in PAPER.items():
            curves[f"paper, A800: {mode}"] = {1024 * n: seconds for n, seconds in points.items()}
    for line in lines:
        same = (line["model"], line.get("steps"), line["batch"]) == (model, steps, 1)
        same = same and line.get("engine", "eager") == "eager"
        if same and line["phase"] == "generation" and line["new_tokens"] == 128:
            who = "authors' path" if line["bench"] == "reference" else "ours"
            label = f"{who}, {short_name(line['device'])}: {line['mode']}"
            curves[label][line["tokens"]] = line["seconds"]
    return dict(curves)


def short_name(device: str) -> str:
    """NVIDIA H100 80GB HBM3 -> H100"""
    words = device.removeprefix("NVIDIA ").split()
    return words[0].strip(",")


def draw(curves: Curves, title: str, path: Path) -> None:
    figure, ((panel,),) = figures.subplots(figsize=(6, 4.5))
    for number, (label, points) in enumerate(curves.items()):
        line = "-" if label.startswith("ours") else "--"
        figures.draw_curve(panel, points, label, line, number)
    figures.finish_panel(panel, ylabel="seconds a generation", title=title, yscale="log")
    panel.legend()
    figures.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", default="llada")
    parser.add_argument("--steps", type=int, default=128, help="T")
    args = parser.parse_args()
    lines = [json.loads(line) for path in args.results for line in path.read_text().splitlines()]
    curves = curves_of(lines, args.model, args.steps)
    if not any(label.startswith("ours") for label in curves):
        parser.error(f"no line is of a generation of {args.model} in {args.steps} steps")
    draw(curves, f"{args.model}, {args.steps} steps, 128 new tokens", args.image)


if __name__ == "__main__":
    main()
