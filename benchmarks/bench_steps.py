# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Seconds a denoising step, by phase, through vLLM's engine on the shapes of the real checkpoints.

    python benchmarks/bench_steps.py --model llada --lengths 4096 16384 >> results/steps.jsonl

Weights are vLLM's dummies, so what attention keeps is close to random; how much it keeps is
`select`. Dense and sparse steps of one request lie in one run: T steps, of which the first
int(T * 0.2) + 1 are dense, one records, the rest are sparse. A short request runs first, uncounted,
to compile. One JSON line for each length and phase. On a CPU take --layers 1: what matters there is
how the phases compare, and all layers cost the same.
"""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the steps are timed one by one
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import torch
import triton
import vllm
from checkpoints import Shape, dream_config, llada_config
from vllm import LLM, SamplingParams

from sparsed_vllm.phases import phase_of

MODELS = {
    "llada": (llada_config, Shape(126464, 32, 32, 32, 4096, 12288)),
    "dream": (dream_config, Shape(152064, 28, 28, 4, 3584, 18944)),
}
NEW_TOKENS, STEPS, SKIP, SELECT = 128, 12, 0.2, 0.3
WARM_UP_TOKENS = 4096


def start(model: str, num_layers: int | None, longest: int) -> LLM:
    write, shape = MODELS[model]
    shape = replace(shape, max_length=longest, n_layers=num_layers or shape.n_layers)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(write(shape, False)))
        return LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=longest,
            max_num_batched_tokens=longest,
            max_num_seqs=4,
            gpu_memory_utilization=0.92 if torch.cuda.is_available() else 0.5,
            async_scheduling=False,
            enforce_eager=True,
        )


def time_steps(llm: LLM, length: int, block_size: int) -> dict[str, list[float]]:
    """Seconds of each step of one request of `length` tokens, by phase."""
    prompt = {"prompt_token_ids": [i % 250 for i in range(length - NEW_TOKENS)]}
    sparse = {"use_sparsed": 1, "sparsed_skip": SKIP, "sparsed_select": SELECT}
    params = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        detokenize=False,
        extra_args={"steps": STEPS, "sparsed_block_size": block_size, **sparse},
    )
    llm.llm_engine.add_request("0", prompt, params)
    seconds = defaultdict(list)
    for step in range(STEPS):
        wait()
        begin = time.perf_counter()
        llm.llm_engine.step()
        wait()
        seconds[phase_of(step, STEPS, SKIP).value].append(time.perf_counter() - begin)
    assert not llm.llm_engine.has_unfinished_requests()
    return seconds


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {len(os.sched_getaffinity(0))} cores"


def report(model: str, length: int, block_size: int, seconds: dict[str, list[float]]) -> None:
    for phase, times in seconds.items():
        line = {
            "bench": "steps",
            "model": model,
            "device": device_name(),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "tokens": length,
            "new_tokens": NEW_TOKENS,
            "steps": STEPS,
            "batch": 1,
            "select": SELECT,
            "block_size": block_size,
            "phase": phase,
            "seconds": statistics.median(times),
            "spread": max(times) - min(times),
            "count": len(times),
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="llada")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    args = parser.parse_args()
    llm = start(args.model, args.layers, max(args.lengths))
    time_steps(llm, min(WARM_UP_TOKENS, *args.lengths), args.block_size)  # compiles every kernel
    for length in sorted(args.lengths):
        report(args.model, length, args.block_size, time_steps(llm, length, args.block_size))


if __name__ == "__main__":
    main()
