# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Draws what bench_attention.py printed, a panel for each shape: TFLOP/s over tokens.

pip install matplotlib
python benchmarks/plot_attention.py benchmarks/results/attention.jsonl attention.png
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

Curves = dict[str, dict[str, dict[int, float]]]


def curves_of(lines: list[dict], density: float, lists: str) -> Curves:
    """shape -> kernel -> tokens -> TFLOP/s; of lines that say the same, the last counts."""
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        wanted = line.get("asked") == density and line.get("lists") == lists
        if wanted and line["tflops"]:
            curves[line["shape"]][line["kernel"]][line["tokens"]] = line["tflops"]
    return curves


def draw(curves: Curves, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(curves), figsize=(6 * len(curves), 5), sharey=True, squeeze=False
    )
    for panel, (shape, kernels) in zip(panels[0], curves.items(), strict=True):
        for kernel, points in kernels.items():
            style = "o-" if kernel.startswith("ours") else "s--"
            panel.plot(*zip(*sorted(points.items()), strict=True), style, label=kernel)
        panel.set(title=shape, xlabel="tokens", ylim=(0, None))
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("TFLOP/s of kept blocks")
    panels[0][-1].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--lists", default="random")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    curves = curves_of(lines, args.density, args.lists)
    if not curves:
        parser.error(f"{args.results} holds no line for {args.lists} lists at {args.density}")
    device = next(line["device"] for line in lines)
    draw(curves, f"{device}, {args.density:.0%} of the blocks, {args.lists} lists", args.image)


if __name__ == "__main__":
    main()
