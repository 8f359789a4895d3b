# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Engines of several processes, each rank on a device of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

NUM_DEVICES = torch.cuda.device_count() or len(os.sched_getaffinity(0))

needs_two_devices = pytest.mark.skipif(
    NUM_DEVICES < 2, reason="needs two GPUs, or two cores where there is no GPU"
)

SIZES: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "disable_log_stats": False,
    "additional_config": {"reuse": {"by_default": 0}},
    "kv_cache_memory_bytes": 1 << 26,
    "gpu_memory_utilization": 0.1,
}
STYLES: tuple[dict[str, Any], ...] = (
    {"steps": 8},
    {"block_length": 4},
    {"threshold": 0.05},
    {"use_sparsed": 1, "sparsed_block_size": 16},
    {"steps": 8, "kv_share": 0.1},
    {"use_sparsed": 1, "sparsed_block_size": 16, "kv_share": 0.1},
)

Answers = tuple[list[list[int]], dict[str, Any]]
"""Tokens of each request, and the engine's counters afterwards."""


def answers_of(llm: LLM) -> Answers:
    """What an engine of these SIZES answers, in every style."""
    prompts = [{"prompt_token_ids": [i * 3 % 256 for i in range(n)]} for n in (1, 30, 200)]
    tokens = []
    for sampling in ({"temperature": 0}, {"temperature": 0.8, "seed": 3}):
        for extra in STYLES:
            params = SamplingParams(max_tokens=16, ignore_eos=True, extra_args=extra, **sampling)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            tokens += [list(output.outputs[0].token_ids) for output in outputs]
    counts = {
        f"{metric.name} {metric.labels.get('phase', '')}": metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith(("vllm:diffusion", "vllm:sparsed"))
    }
    return tokens, counts


def answers_of_ranks(path: str | Path, ranks: int, **options: Any) -> Answers:
    """The same of an engine of several processes, in a process tree of its own."""
    # vLLM binds each process to cores; it cannot share out one NUMA node itself.
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(i) for i in range(ranks))}
    done = subprocess.run(
        [sys.executable, __file__, path, str(ranks), json.dumps(options)],
        capture_output=True,
        text=True,
        env={**os.environ, **cores},
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    tokens, counts = json.loads(lines[0].removeprefix("RESULT "))
    return tokens, counts


if __name__ == "__main__":
    model, num_ranks, more = sys.argv[1:]
    engine = LLM(model, tensor_parallel_size=int(num_ranks), **SIZES, **json.loads(more))
    print("RESULT", json.dumps(answers_of(engine)))
