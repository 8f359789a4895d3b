# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Ask a diffusion language model for needles in haystacks, with dense and with sparse attention.

    python examples/demo.py [CHECKPOINT]

Without a checkpoint the small model of examples/needle answers, which is trained to.
"""

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import itertools
import random
import string
import sys
import time
from dataclasses import dataclass

import torch
from needle import checkpoint
from needle.tasks import TASKS, Sample, spell
from vllm import LLM, SamplingParams

from sparsed_vllm.steps import recording_step

ASKED = [("single", 1250), ("multikey", 1300), ("multiquery", 1350), ("common", 1200)]  # tokens
MIN_WORDS = 1000
CANVAS, STEPS = 32, 16
MODES = {
    "dense": {"use_sparsed": 0},
    "sparse": {"use_sparsed": 1, "sparsed_block_size": 32},  # skip 0.2 and select 0.3
}


DENSE_STEPS = recording_step(STEPS, 0.2) + 1
NOTE = f"""
Each question is asked twice through LLM.chat, one request at a time: {STEPS} denoising steps for
{CANVAS} tokens, the first {DENSE_STEPS} of them dense in either mode. Seconds are the wall clock
around a request. Key blocks: those that a sparse step reads, of those that a dense one would,
from the engine's own counters. Device: {{device}}."""


@dataclass(frozen=True)
class Answer:
    """What the model gave, and the seconds and the share of the key blocks that it took."""

    text: str
    seconds: float
    kept: float


def find(task: str, tokens: int, words: int = MIN_WORDS) -> Sample:
    """The first that has enough words, for not all are one token; the same in every run."""
    samples = (TASKS[task](random.Random(seed), tokens) for seed in itertools.count())
    return next(sample for sample in samples if num_words(sample) >= words)


def num_words(sample: Sample) -> int:
    return sum(word not in string.punctuation for word in sample.haystack)


def start(path: str) -> LLM:
    dtype = "auto" if torch.cuda.is_available() else "float32"
    return LLM(
        path,
        dtype=dtype,
        max_model_len=4096,
        enforce_eager=True,
        disable_log_stats=False,  # for the counters
        use_tqdm_on_load=False,
    )


def ask(llm: LLM, sample: Sample, mode: str) -> Answer:
    params = SamplingParams(
        temperature=0, max_tokens=CANVAS, extra_args={"steps": STEPS, **MODES[mode]}
    )
    chat = [{"role": "user", "content": sample.text}]
    before, begin = kept_blocks(llm), time.perf_counter()
    (output,) = llm.chat(chat, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    kept, possible = (b - a for a, b in zip(before, kept_blocks(llm), strict=True))
    return Answer(output.outputs[0].text.strip(), seconds, kept / possible if possible else 1)


def kept_blocks(llm: LLM) -> tuple[float, float]:
    """Key blocks that the engine's tables have listed so far, and that they could have."""
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return values["vllm:sparsed_kept_blocks"], values["vllm:sparsed_possible_blocks"]


def report(number: int, sample: Sample, answers: dict[str, Answer]) -> None:
    expected = spell(sample.answer)
    question = f"{spell(sample.question)}   [{sample.task}, {num_words(sample)} words]"
    print(f"\n{number}. {question}")
    print(f"   expected  {expected}")
    for mode, answer in answers.items():
        verdict = "right" if answer.text == expected else "WRONG"
        cost = f"{answer.seconds:5.1f} s, {answer.kept:4.0%} of the key blocks"
        print(f"   {mode:9} {answer.text:56} {verdict}, {cost}", flush=True)


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else str(checkpoint.SHIPPED)
    print(f"starting vLLM with {path} ...", flush=True)
    llm = start(path)
    samples = [find(task, tokens) for task, tokens in ASKED]
    for mode in MODES:  # the first steps of an engine load and compile
        ask(llm, find("single", 200, words=100), mode)
    for number, sample in enumerate(samples, 1):
        report(number, sample, {mode: ask(llm, sample, mode) for mode in MODES})
    print(NOTE.format(device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"))


if __name__ == "__main__":
    main()
