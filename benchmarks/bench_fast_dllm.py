# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Seconds of a generation by Fast-dLLM's own loops, prefix and dual cache, on random weights.

    git clone https://github.com/NVlabs/Fast-dLLM
    python benchmarks/bench_fast_dllm.py --checkout Fast-dLLM \\
        --lengths 1024 8192 32768 65536 >> benchmarks/results/generate_reuse.jsonl

Fast-dLLM (arXiv 2505.22618), version 1, runs from its checkout; nothing of it is kept here.
LLaDA-8B's shape, bfloat16. A block's first step computes all tokens, the others those from it
on (prefix) or the block alone (dual). Up to --whole-up-to tokens a generation is run whole, beyond
added up from steps of both kinds (`projected`). Above 16,384 tokens their code may keep more than
80 GB hold: what is changed of it at run time is in `patched`, and none of it makes a step slower.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

# Tensors of 17 GB leave gaps that others of 17 GB must fill.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from caches import lines
from caches.checkout import build, load
from caches.clock import Load, Loop
from torch import Tensor

PATCHED = [
    "choice, with its float64 softmax: of the canvas's rows, not of all",
    "attention bias, which attention ignores: not made",
    "a block's logits, keys and values: freed before the next; light steps return none",
]
LOOPS = {"prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}


class Sparing:
    """Their model, holding the outputs of one whole step at most."""

    def __init__(self, model: Any) -> None:
        self.model, self.device, self.config = model, model.device, model.config
        self.held: list[Tensor] = []

    def __call__(self, tokens: Tensor, past_key_values: Any = None, **options: Any) -> Any:
        options["use_cache"] = past_key_values is None
        if past_key_values is not None:
            return self.model(tokens, past_key_values=past_key_values, **options)
        for tensor in self.held:  # their loop still names them, and reads them no more
            tensor.untyped_storage().resize_(0)
        output = self.model(tokens, **options)
        self.held = [output.logits, *(t for layer in output.past_key_values for t in layer)]
        return output


def choose_in_canvas(
    choose: Callable[..., tuple[Tensor, Tensor]],
    canvas: int,
    logits: Tensor,
    temperature: float,
    remasking: str,
    open_places: Tensor,
    tokens: Tensor,
    *counts: Any,
) -> tuple[Tensor, Tensor]:
    """Their get_transfer_index over the last `canvas` rows, outside of which it chooses none.

    logits [1, rows, vocabulary]; open_places, tokens [1, rows].  Returns tokens and chosen places
    """
    last = slice(-canvas, None)
    rows = logits[:, last], temperature, remasking, open_places[:, last], tokens[:, last]
    filled, chosen = choose(*rows, *counts)
    prompt = tokens[:, :-canvas]
    return torch.cat((prompt, filled), 1), torch.cat((torch.zeros_like(prompt).bool(), chosen), 1)


def no_bias(cache: dict[str, Tensor], length: int, device: torch.device) -> Tensor:
    """A bias of the size that their code slices, of one number."""
    return torch.zeros(1, 1, 1, 1, device=device).expand(1, 1, length, length)


@contextmanager
def prepared(
    generate: ModuleType, modeling: ModuleType, model: Any, mode: str, load: Load
) -> Iterator[tuple[Loop, Any, list[str]]]:
    loop = partial(getattr(generate, LOOPS[mode]), mask_id=model.config.mask_token_id)
    if load.length <= lines.FITS:
        yield loop, model, []
        return
    choose = partial(choose_in_canvas, generate.get_transfer_index, load.new_tokens)
    with (
        patch.object(generate, "get_transfer_index", choose),
        patch.object(modeling, "get_causal_attention_bias", no_bias),
    ):
        yield loop, Sparing(model), PATCHED


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = lines.parser(__doc__, list(LOOPS))
    args = parser.parse_args(argv)
    lines.check(parser, args)
    if not (args.checkout / "llada" / "generate.py").is_file():
        parser.error(f"--checkout must have llada/generate.py, {args.checkout} has none.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    generate, modeling = load(args.checkout / "llada", "generate", "model.modeling_llada")
    model = build(modeling, "cuda" if torch.cuda.is_available() else "cpu", **args.config)
    modes = {mode: partial(prepared, generate, modeling, model, mode) for mode in args.modes}
    lines.measure("fast-dllm", args, modes)


if __name__ == "__main__":
    main()
