# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Ways to decode, by tokens a second and by how right they are: the needle model, in the engine.

    python benchmarks/bench_decoding.py >> benchmarks/results/decoding.jsonl

All ways answer the same questions, all at once. Tokens are those of the texts that come back, up
to their ends; masks behind an end count for nothing, however long they took. Shares in percent, as
in bench_quality.py, each with half of its 95% interval.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# In this process: the steps are counted by its engine.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
sys.path.append(str(Path(__file__).parents[1] / "examples"))

import torch
from attention.timing import spread
from generation.dummies import versions
from needle import checkpoint
from needle.batches import EOS_ID
from needle.tasks import TASKS
from quality.answers import start_engine
from quality.intervals import mean
from quality.questions import Question, draw, mark


@dataclass(frozen=True)
class Way:
    """How requests are decoded.  request: parameters beside the canvas"""

    name: str
    request: dict[str, Any] = field(default_factory=dict)


REUSE = {"kv_share": 0.02}  # the preset's


def ways(canvas: int) -> list[Way]:
    """From one place a step to many; blocks of 8 can end a request early."""
    eighth = {"block_length": 8}
    return [
        Way("1 place a step", {"early_stop": 0}),
        Way("2 places a step", {"early_stop": 0, "steps": canvas // 2}),
        Way("4 places a step", {"early_stop": 0, "steps": canvas // 4}),
        Way("1 place a step, blocks of 8", {**eighth, "early_stop": 0}),
        Way("1 place a step, blocks of 8, early stop", eighth),
        Way("threshold 0.9", {"threshold": 0.9}),
        Way("threshold 0.7", {"threshold": 0.7}),
        Way("threshold 0.5", {"threshold": 0.5}),
        Way("threshold 0.9, blocks of 8, early stop", {**eighth, "threshold": 0.9}),
        Way("reuse, 1 place a step", {"early_stop": 0, **REUSE}),
        Way("reuse, 1 place a step, blocks of 8, early stop", {**eighth, **REUSE}),
        Way("reuse, threshold 0.9", {"threshold": 0.9, **REUSE}),
        Way("reuse, threshold 0.7", {"threshold": 0.7, **REUSE}),
        Way("reuse, threshold 0.9, blocks of 8, early stop", {**eighth, "threshold": 0.9, **REUSE}),
    ]


def answer(llm: Any, way: Way, questions: list[Question], canvas: int) -> list[list[int]]:
    """The texts' tokens, without their ends."""
    from vllm import SamplingParams

    extra = {"use_sparsed": 0, **way.request}
    params = SamplingParams(temperature=0, max_tokens=canvas, extra_args=extra, detokenize=False)
    prompts = [{"prompt_token_ids": question.prompt} for question in questions]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [until_end(list(output.outputs[0].token_ids)) for output in outputs]


def until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS_ID)] if EOS_ID in tokens else tokens


def num_steps(llm: Any) -> int:
    """Steps of all requests so far."""
    name = "vllm:diffusion_num_denoising_steps"
    return int(sum(metric.value for metric in llm.get_metrics() if metric.name == name))


def measure(
    llm: Any, way: Way, questions: list[Question], canvas: int, rounds: int
) -> dict[str, Any]:
    """What a line says of one way: seconds are the median of the rounds."""
    before, times = num_steps(llm), []
    for _ in range(rounds):
        begin = time.perf_counter()
        given = answer(llm, way, questions, canvas)
        times.append(time.perf_counter() - begin)
    marks = [mark(question, tokens) for question, tokens in zip(questions, given, strict=True)]
    tokens, exact = mean([m.tokens for m in marks]), mean([float(m.exact) for m in marks])
    seconds, count = statistics.median(times), sum(map(len, given))
    return {
        "way": way.name,
        **{"block_length": canvas, "steps": canvas, "threshold": None, "early_stop": 1},
        "kv_share": None,
        **way.request,
        "seconds": round(seconds, 3),
        "spread": round(spread(times), 3),
        "text_tokens": count,
        "tokens_per_second": round(count / seconds, 2),
        "steps_a_request": round((num_steps(llm) - before) / rounds / len(questions), 2),
        "tokens_right": round(100 * tokens.value, 2),
        "tokens_right_margin": round(100 * tokens.margin, 2),
        "exact": round(100 * exact.value, 2),
        "exact_margin": round(100 * exact.margin, 2),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=checkpoint.SHIPPED, help="a checkpoint folder")
    add("--length", type=int, default=512, help="tokens of a prompt")
    add("--samples", type=int, default=4, help="questions of each of the six tasks")
    add("--canvas", type=int, default=32)
    add("--rounds", type=int, default=3)
    add("--compiled", action="store_true", help="torch.compile and CUDA graphs, as vLLM has them")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    indices = range(args.samples)
    questions = [draw(task, args.length, args.canvas, i) for task in TASKS for i in indices]
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    llm = start_engine(
        args.model,
        disable_log_stats=False,
        dtype=dtype,
        enforce_eager=not args.compiled,
        additional_config={"reuse": {"by_default": 0}},
    )
    for request in ({"steps": 1}, {"steps": 2, **REUSE}):
        answer(llm, Way("warm up", request), questions, args.canvas)
    for way in ways(args.canvas):
        line = {
            "bench": "decoding",
            "model": args.model.name if args.model != checkpoint.SHIPPED else "needle",
            **versions(),
            "tokens": args.length + args.canvas,
            "new_tokens": args.canvas,
            "dtype": dtype,
            "engine": "compiled" if args.compiled else "eager",
            "questions": len(questions),
            "rounds": args.rounds,
            **measure(llm, way, questions, args.canvas, args.rounds),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
