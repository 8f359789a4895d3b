# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Choosing tokens from logits: our kernel and its torch twin on the GPU, a JSON line for each case.

    python benchmarks/bench_unmasking.py >> benchmarks/results/unmasking.jsonl

`ratio_to_floor` compares with the time that reading the logits once takes at the card's rate.
"""

import argparse
import json
import statistics

import torch
import triton
from attention.timing import measure, spread

from sparsed_vllm.kernels import api, reference
from sparsed_vllm.kernels.choice import Choice, Forbidden, Noise

BANDWIDTH = 3.35e12  # bytes a second, of an H100 SXM's memory
MASK = 5
CHOICES = {
    "greedy": Choice(),
    "entropy": Choice(confidence="entropy"),
    "drawn": Choice(1.0),
    "top_p": Choice(1.0, tempered=True, top_p=0.95),
    "top_k": Choice(1.0, tempered=True, top_k=50),
}


def line_of(name: str, logits: torch.Tensor, rounds: int) -> dict[str, object]:
    choice = CHOICES[name]
    places = torch.arange(len(logits), device=logits.device)
    noise = Noise(places * 0 + 1, places, places * 0) if choice.temperature else None
    arguments = (logits, choice, Forbidden(MASK), noise)
    times = measure(
        {
            "fused": lambda: api.choose_tokens(*arguments),
            "torch": lambda: reference.choose_tokens(*arguments),
        },
        rounds,
    )
    fused, plain = (statistics.median(times[kind]) for kind in ("fused", "torch"))
    floor = logits.numel() * logits.element_size() / BANDWIDTH * 1e3
    return {
        "bench": "unmasking",
        "choice": name,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": logits.shape[0],
        "vocab": logits.shape[1],
        "rounds": rounds,
        "fused_ms": round(fused, 4),
        "fused_spread": round(spread(times["fused"]), 4),
        "torch_ms": round(plain, 4),
        "fused_bytes": peak_bytes(lambda: api.choose_tokens(*arguments)),
        "torch_bytes": peak_bytes(lambda: reference.choose_tokens(*arguments)),
        "ratio_to_floor": round(fused / floor, 2),
    }


def peak_bytes(call) -> int:
    """Memory that it takes beside what is there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 1024])
    parser.add_argument("--vocab", type=int, nargs="+", default=[126464, 152064])
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    args = parse()
    # A row at a time suits a CPU; a GPU needs more at once.
    reference._ROW_ELEMENTS = 1 << 25
    for vocab in args.vocab:
        for rows in args.rows:
            logits = (torch.randn(rows, vocab, device="cuda") * 3).bfloat16()
            for name in args.choices:
                print(json.dumps(line_of(name, logits, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
