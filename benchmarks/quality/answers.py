# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Answers of a method: by the network in plain PyTorch, or through vLLM's engine."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from needle import checkpoint
from needle.decoding import denoise
from needle.network import Attention, Network, full_attention
from torch import Tensor

from quality.attention import SparseAttention
from quality.caches import denoise_in_blocks
from quality.methods import Method
from quality.questions import Question

if TYPE_CHECKING:  # with it comes vLLM, which the networks by themselves do without
    from quality.reuse_methods import ReuseMethod

KEPT_TOKENS = 1 << 20  # whose keys and values a batch may keep: 8 GiB of the small model's
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}  # in which vLLM runs the model there

# Tokens of each, and the share of key blocks that sparse steps read, where it is known.
Answers = tuple[list[list[int]], float | None]


def load(folder: Path, device: torch.device, dtype: str | None = None) -> Network:
    """The network of a checkpoint.  dtype: left out, that of the device"""
    return checkpoint.load(folder).to(device, getattr(torch, dtype or DTYPES[device.type]))


class Remembering:
    """A network that computes no canvas twice which it sees in full.

    All methods begin with the same dense steps over the same questions.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.prompts: Tensor | None = None
        self.known: dict[bytes, Tensor] = {}

    def __call__(self, tokens: Tensor, rows: slice, attend: Attention) -> Tensor:
        """rows: the canvas.  As Network.forward"""
        if attend is not full_attention:
            return self.network(tokens, rows, attend)
        prompts = tokens[:, : rows.start]
        if self.prompts is None or not torch.equal(self.prompts, prompts):
            self.prompts, self.known = prompts.clone(), {}
        canvas = tokens[:, rows].cpu().numpy().tobytes()
        if canvas not in self.known:
            self.known[canvas] = self.network(tokens, rows, attend)
        return self.known[canvas]


class Harness:
    """The network by itself; all questions of a call go through it together."""

    def __init__(self, network: Network, canvas: int, steps: int, block_size: int) -> None:
        self.network, self.block_size = Remembering(network), block_size
        self.canvas, self.steps = canvas, steps
        self.device = next(network.parameters()).device

    def answer(self, method: Method, questions: list[Question]) -> Answers:
        """questions: their prompts are of one length"""
        prompts = torch.tensor([question.prompt for question in questions], device=self.device)
        attention = SparseAttention(
            method,
            batch=len(questions),
            prompt=prompts.shape[1],
            canvas=self.canvas,
            steps=self.steps,
            block_size=method.block_size or self.block_size,
            query_block_size=method.query_block_size,
            device=self.device,
        )
        answers = denoise(self.network, prompts, self.canvas, self.steps, attention)
        return answers.tolist(), attention.density


class CachedHarness:
    """The network by itself, with Fast-dLLM's caches.

    steps, passes: what its answers have cost so far: steps, and prompts that these computed
    """

    def __init__(
        self, network: Network, canvas: int, steps: int, batch: int, threshold: float | None
    ) -> None:
        self.network, self.canvas, self.num_steps = network, canvas, steps
        self.batch, self.threshold = batch, threshold
        self.device = next(network.parameters()).device
        self.steps = self.passes = 0

    def answer(self, method: "ReuseMethod", questions: list[Question]) -> Answers:
        """questions: their prompts are of one length"""
        assert method.cache is not None
        answers = []
        prompts = torch.tensor([question.prompt for question in questions], device=self.device)
        batch = min(self.batch, max(1, KEPT_TOKENS // (prompts.shape[1] + self.canvas)))
        for part in prompts.split(batch):
            done = denoise_in_blocks(
                self.network,
                part,
                self.canvas,
                self.num_steps,
                cache=method.cache,
                block=method.block_length,
                threshold=self.threshold,
            )
            self.steps += done.steps
            self.passes += done.whole
            answers += done.answers.tolist()
        return answers, None


class Engine:
    """LLM.generate, with the method in each request's parameters."""

    def __init__(self, llm: Any, canvas: int, steps: int, block_size: int, **extras: Any) -> None:
        """extras: further parameters of every request"""
        self.llm, self.canvas = llm, canvas
        self.extras = {"steps": steps, "sparsed_block_size": block_size, **extras}

    def answer(self, method: Method, questions: list[Question]) -> Answers:
        from vllm import SamplingParams

        assert method.request is not None, "the engine has no such method"
        params = SamplingParams(
            temperature=0,
            max_tokens=self.canvas,
            ignore_eos=True,
            detokenize=False,
            extra_args={**self.extras, **method.request},
        )
        prompts = [{"prompt_token_ids": question.prompt} for question in questions]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs], None


def start_engine(folder: Path, **options: Any) -> Any:
    """vLLM on the checkpoint, with room in its tables for the smallest blocks."""
    from vllm import LLM

    defaults = {
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 30,
        "gpu_memory_utilization": 0.3,
        "additional_config": {"sparsed": {"table_ids": 32}},
    }
    return LLM(str(folder), **{**defaults, **options})
