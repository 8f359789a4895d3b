# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Draws what bench_attention.py printed, a panel for each shape: TFLOP/s over tokens.

    pip install matplotlib
    cd benchmarks/results
    python ../plot_attention.py attention_{pair,sweep}.jsonl attention.jsonl ../../docs/layer.png

Solid: ours. Dashed: others over lists. Dotted: over all keys. Of lines that say the same, the last
counts.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import figures

APART = {"block_scores"}  # has a rate, but is no attention
Curves = dict[str, dict[str, dict[int, float]]]


def curves_of(lines: list[dict], density: float, lists: str) -> Curves:
    """shape -> kernel -> tokens -> TFLOP/s"""
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        wanted = line.get("asked") == density and line.get("lists") == lists
        wanted = wanted and line.get("block_size", 128) == 128
        if wanted and line["tflops"] and line["kernel"] not in APART:
            curves[line["shape"]][line["kernel"]][line["tokens"]] = line["tflops"]
    return curves


def line_of(kernel: str) -> str:
    if kernel.startswith("ours"):
        return "-"
    return ":" if kernel.endswith("_dense") or kernel == "fa3_tiles128" else "--"


def draw(curves: Curves, title: str, path: Path) -> None:
    figure, panels = figures.subplots(len(curves), figsize=(3.4 * len(curves) + 2, 5), sharey=True)
    names = sorted({kernel for kernels in curves.values() for kernel in kernels})
    for panel, (shape, kernels) in zip(panels[0], curves.items(), strict=True):
        for kernel, points in kernels.items():
            figures.draw_curve(panel, points, kernel, line_of(kernel), names.index(kernel))
        figures.finish_panel(panel, title=shape, ylim=(0, None))
    panels[0][0].set_ylabel("TFLOP/s of kept blocks")
    fullest = max(panels[0], key=lambda panel: len(panel.lines))
    figure.legend(*fullest.get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(title)
    figures.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("image", type=Path)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--lists", default="random")
    args = parser.parse_args()
    lines = [json.loads(line) for path in args.results for line in path.read_text().splitlines()]
    curves = curves_of(lines, args.density, args.lists)
    if not curves:
        parser.error(f"no line is of {args.lists} lists at {args.density}")
    device = next(line["device"] for line in lines)
    draw(curves, f"{device}, {args.density:.0%} of the blocks, {args.lists} lists", args.image)


if __name__ == "__main__":
    main()
