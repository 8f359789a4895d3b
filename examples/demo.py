# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Generate a ragged batch with a diffusion language model inside vLLM, and say what it took.

    python examples/demo.py [CHECKPOINT]

Without a checkpoint, a small LLaDA with random weights is made on the spot: its text is noise.
"""

import os

# The engine runs in this process, so that its steps can be counted as they happen.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import sys
import tempfile
import time
from dataclasses import dataclass

import torch
from checkpoints import write_llada
from tqdm import tqdm
from vllm import LLM, RequestOutput, SamplingParams


@dataclass(frozen=True)
class Question:
    """A prompt and how to denoise its answer."""

    prompt: str
    max_tokens: int
    steps: int
    block_length: int

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            temperature=0,
            max_tokens=self.max_tokens,
            extra_args={"steps": self.steps, "block_length": self.block_length},
        )


QUESTIONS = [
    Question("Hi!", max_tokens=16, steps=16, block_length=16),
    Question("How many legs has a spider, and how many has an ant?", 32, 16, 8),
    Question("Once upon a time, " * 12, max_tokens=64, steps=32, block_length=32),
    Question("The quick brown fox jumps over the lazy dog. " * 8, 48, 12, 48),
]


def start(path: str) -> LLM:
    dtype = "auto" if torch.cuda.is_available() else "float32"
    return LLM(path, dtype=dtype, max_model_len=1024, enforce_eager=True, disable_log_stats=False)


def generate(llm: LLM, questions: list[Question]) -> tuple[list[RequestOutput], float]:
    """The answers, and the seconds they took, with a bar that moves once a denoising step."""
    num_steps = max(question.steps for question in questions)
    step = llm.llm_engine.step
    with tqdm(total=num_steps, desc="denoising", unit="step") as bar:

        def counted_step() -> list[RequestOutput]:
            bar.update()
            return step()

        llm.llm_engine.step = counted_step
        begin = time.perf_counter()
        outputs = llm.generate(
            [question.prompt for question in questions],
            [question.sampling() for question in questions],
            use_tqdm=False,
        )
        return outputs, time.perf_counter() - begin


def report(questions: list[Question], outputs: list[RequestOutput], seconds: float) -> None:
    for question, output in zip(questions, outputs, strict=True):
        (answer,) = output.outputs
        took = output.metrics.last_token_ts - output.metrics.scheduled_ts
        print(f"\nprompt  {question.prompt[:60]!r} ({len(output.prompt_token_ids)} tokens)")
        print(f"answer  {answer.text[:60]!r}")
        print(
            f"        {len(answer.token_ids)} tokens ({answer.finish_reason}) in {question.steps} "
            f"steps and {took:.2f} s: {len(answer.token_ids) / took:.1f} tokens/s"
        )
    total = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"\nbatch   {total} tokens in {seconds:.2f} s: {total / seconds:.1f} tokens/s")
    print(
        "\nWhere the numbers come from: tokens are those of LLM.generate's outputs, up to EOS; "
        "steps are the request's own\nextra_args; a request's seconds are vLLM's metrics, from "
        "its first step to its last token; the batch's are the\nwall clock around LLM.generate. "
        f"Device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}."
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = sys.argv[1] if len(sys.argv) > 1 else str(write_llada(folder))
        print(f"starting vLLM with {'a random LLaDA' if path == folder else path} ...", flush=True)
        llm = start(path)
        report(QUESTIONS, *generate(llm, QUESTIONS))


if __name__ == "__main__":
    main()
