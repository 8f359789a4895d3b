# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Seconds of a generation by Sparse-dLLM's own loop, which evicts half of its cache.

    git clone https://github.com/OpenMOSS/Sparse-dLLM
    python benchmarks/bench_sparse_dllm.py --checkout Sparse-dLLM \\
        --lengths 1024 8192 32768 65536 >> benchmarks/results/generate_reuse.jsonl

Sparse-dLLM (arXiv 2508.02558) runs from its checkout; nothing of it is kept here. LLaDA-8B's
shape, bfloat16, random weights, its defaults: half of the keys, pooled by 3. The first two steps of
a block compute all tokens, the others the block alone. Whole and added-up generations, and
`patched`, as in bench_fast_dllm.py.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

# Tensors of 17 GB leave gaps that others of 17 GB must fill.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from caches import lines
from caches.checkout import build, load
from caches.clock import Load, Loop
from torch import Tensor

PATCHED = ["softmax of logits: written over the logits"]
ROWS = 4096
"""Of which the softmax is taken at once, where it is written over them"""
FOLDER = "opencompass/models"
MODE = "evict"


def softmax_in_place(logits: Tensor, dim: int) -> Tensor:
    """logits [1, rows, vocabulary], of which their loop has taken the largest before"""
    for part in logits.split(ROWS, dim=1):
        part.copy_(part.softmax(dim))
    return logits


@contextmanager
def prepared(generate: ModuleType, model: Any, load: Load) -> Iterator[tuple[Loop, Any, list[str]]]:
    loop = partial(generate.generate, mask_id=model.config.mask_token_id)
    if load.length <= lines.FITS:
        yield loop, model, []
        return
    with patch.object(generate, "F", SimpleNamespace(softmax=softmax_in_place)):
        yield loop, model, PATCHED


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = lines.parser(__doc__, [MODE])
    args = parser.parse_args(argv)
    lines.check(parser, args)
    if not (args.checkout / FOLDER / "sparse_dllm").is_dir():
        parser.error(f"--checkout must have {FOLDER}/sparse_dllm, {args.checkout} has none.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    names = "sparse_dllm.llada_generate", "sparse_dllm.modeling_llada"
    generate, modeling = load(args.checkout / FOLDER, *names)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(modeling, device, block_len=args.block_length, **args.config)
    lines.measure("sparse-dllm", args, {MODE: partial(prepared, generate, model)})


if __name__ == "__main__":
    main()
