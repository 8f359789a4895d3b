# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Draws seconds a generation over the context's length: exact, SparseD, reuse, and others' caches.

    pip install matplotlib
    python benchmarks/plot_reuse.py benchmarks/results/generate_reuse.jsonl docs/reuse_latency.png

Lines of bench_reuse.py, bench_fast_dllm.py and bench_sparse_dllm.py, single requests on one kind of
card; of those that say the same, the last counts.
"""

import argparse
import json
from pathlib import Path

from plot_generate import Curves, draw, short_name

NAMES = {
    ("ours", "dense"): "ours: exact",
    ("ours", "sparse"): "ours: SparseD",
    ("ours", "reuse"): "ours: reuse",
    ("ours", "reuse+sparse"): "ours: reuse with tables",
    ("fast-dllm", "prefix"): "Fast-dLLM: prefix cache",
    ("fast-dllm", "dual"): "Fast-dLLM: dual cache",
    ("sparse-dllm", "evict"): "Sparse-dLLM",
}


def curves_of(lines: list[dict], model: str, steps: int, new_tokens: int) -> Curves:
    """By the order of NAMES; of networks with all their layers."""
    curves: Curves = {}
    for key, name in NAMES.items():
        for line in lines:
            same = (line["engine"], line["mode"]) == key and line["batch"] == 1
            same = same and (line["model"], line["steps"]) == (model, steps)
            same = same and line["new_tokens"] == new_tokens
            if same and not line.get("layers") and not line.get("config"):
                label = name if line["share"] is None else f"{name}, share {line['share']:g}"
                curves.setdefault(label, {})[line["tokens"]] = line["seconds"]
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", type=Path, nargs="+")
    add("image", type=Path)
    add("--model", default="llada")
    add("--steps", type=int, default=128, help="T")
    add("--new-tokens", type=int, default=128)
    add("--card", default="H100", help="as in the lines' device")
    args = parser.parse_args()
    lines = [json.loads(line) for path in args.results for line in path.read_text().splitlines()]
    lines = [line for line in lines if short_name(line["device"]) == args.card]
    curves = curves_of(lines, args.model, args.steps, args.new_tokens)
    if not curves:
        parser.error(f"no line is of {args.model} in {args.steps} steps on {args.card}")
    title = f"{args.model}, {args.card}, {args.steps} steps, {args.new_tokens} new tokens"
    draw(curves, title, args.image)


if __name__ == "__main__":
    main()
