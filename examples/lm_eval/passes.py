# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Passes of estimates.py through the network of an engine: packed, dense, nothing kept.

They are no requests: those begin with a canvas of masks, and here answers are masked in part. The
network runs in vLLM's workers (`LLM.apply_model`), with the backend's own attention metadata.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from estimates import Ids, Pass, Scores
from torch import Tensor
from vllm import LLM
from vllm.forward_context import set_forward_context

from sparsed_vllm.flash import flash_attention
from sparsed_vllm.metadata import plan_launches
from sparsed_vllm.models.network import MaskPredictor
from sparsed_vllm.models.registry import MODELS

ROWS_AT_ONCE = 256  # whose log probabilities exist together: 130 MB for LLaDA's vocabulary


class Batch(NamedTuple):
    """What the workers compute at once.

    sequences: as the model sees them;  blind: the same without their prompts, for guidance
    rows: of all tokens, those whose logits are read
    asked: (which of the rows, which token)
    cfg: LLaDA's scale of guidance; 0: none
    """

    sequences: list[Ids]
    blind: list[Ids]
    rows: list[int]
    asked: list[tuple[int, int]]
    cfg: float


class PassScorer:
    """Scores passes with an engine's network; those that see the same are computed once."""

    def __init__(self, llm: LLM, cfg: float = 0.0) -> None:
        """cfg: LLaDA's classifier-free guidance, which runs each pass again without its prompt"""
        self.llm, self.cfg = llm, cfg
        config = llm.llm_engine.vllm_config
        self.most_tokens: int = config.scheduler_config.max_num_batched_tokens
        self.mask_token_id: int = config.model_config.hf_config.mask_token_id
        self.shift = int(MODELS[config.model_config.architecture].family.shifts_logits)

    def __call__(self, passes: Sequence[Pass]) -> list[Scores]:
        """The scores of each, in order."""
        same: dict[Pass, list[int]] = {}
        for i, one in enumerate(passes):
            same.setdefault(one._replace(tokens=()), []).append(i)
        found: dict[int, Scores] = {}
        for inputs in packed(same, self.most_tokens):
            members = [same[one] for one in inputs]
            asked = [[passes[i].tokens for i in group] for group in members]
            scores = self._score(inputs, asked)
            found.update(zip((i for group in members for i in group), scores, strict=True))
        return [found[i] for i in range(len(passes))]

    def _score(self, inputs: list[Pass], asked: list[list[Ids]]) -> Iterator[Scores]:
        """asked: for each input the tokens of all passes that see it"""
        batch = self._batch(inputs, asked)
        logprobs, best, best_logprobs = self.llm.apply_model(partial(score_batch, batch=batch))[0]
        own, row = iter(logprobs), 0
        for one, variants in zip(inputs, asked, strict=True):
            rows = slice(row, row + len(one.places))
            for tokens in variants:
                yield Scores([next(own) for _ in tokens], best[rows], best_logprobs[rows])
            row = rows.stop

    def _batch(self, inputs: list[Pass], asked: list[list[Ids]]) -> Batch:
        rows: list[int] = []
        pairs: list[tuple[int, int]] = []
        start = 0
        for one, variants in zip(inputs, asked, strict=True):
            for tokens in variants:
                pairs += [(len(rows) + j, token) for j, token in enumerate(tokens)]
            # The first place has no row before it: the authors' code reads its own.
            rows += [start + max(place - self.shift, 0) for place in one.places]
            start += len(one.token_ids)
        sequences = [one.token_ids for one in inputs]
        blind = [self._without_prompt(one) for one in inputs] if self.cfg else []
        return Batch(sequences, blind, rows, pairs, self.cfg)

    def _without_prompt(self, one: Pass) -> Ids:
        return (*[self.mask_token_id] * one.num_prompt, *one.token_ids[one.num_prompt :])


def packed(passes: Iterable[Pass], most_tokens: int) -> Iterator[list[Pass]]:
    """Passes in order, as many together as fit into so many tokens; at least one."""
    batch: list[Pass] = []
    size = 0
    for one in passes:
        if batch and size + len(one.token_ids) > most_tokens:
            yield batch
            batch, size = [], 0
        batch.append(one)
        size += len(one.token_ids)
    if batch:
        yield batch


@torch.inference_mode()
def score_batch(model: MaskPredictor, batch: Batch) -> tuple[list[float], list[int], list[float]]:
    """Run in each worker.

    Returns the log probability of each token that is asked for, and the likeliest token of each row
    with its own.
    """
    rows = torch.tensor(batch.rows, device=device_of(model))
    asked_rows, tokens = torch.tensor(batch.asked, device=rows.device).T
    seeing = run_model(model, batch.sequences)[rows]
    blind = run_model(model, batch.blind)[rows] if batch.blind else None
    own, best_logprobs = torch.empty(len(tokens)), torch.empty(len(rows))
    best = torch.empty(len(rows), dtype=torch.int64)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        logits = model.score(seeing[part]).float()
        if blind is not None:
            without = model.score(blind[part]).float()
            logits = without + (1 + batch.cfg) * (logits - without)
        logprobs = logits.log_softmax(dim=-1)
        largest, likeliest = logprobs.max(dim=-1)
        best_logprobs[part], best[part] = largest.cpu(), likeliest.cpu()
        here = (asked_rows >= start) & (asked_rows < start + ROWS_AT_ONCE)
        own[here.cpu()] = logprobs[asked_rows[here] - start, tokens[here]].cpu()
    return own.tolist(), best.tolist(), best_logprobs.tolist()


def run_model(model: MaskPredictor, sequences: Sequence[Ids]) -> Tensor:
    """Hidden states [tokens of all sequences, hidden_size]; each attends to all of itself."""
    config, device = model.vllm_config, device_of(model)
    lengths = [len(ids) for ids in sequences]
    starts = np.cumsum([0, *lengths], dtype=np.int32)
    pages = torch.zeros(len(lengths), 1, dtype=torch.int32, device=device)  # nobody looks at them
    with_flash = flash_attention(device.type, config.model_config.dtype) is not None
    metadata = plan_launches(starts, pages, with_flash=with_flash)
    layers = config.compilation_config.static_forward_context
    token_ids = torch.tensor([token for ids in sequences for token in ids], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    with set_forward_context(dict.fromkeys(layers, metadata), config, num_tokens=len(token_ids)):
        return model(token_ids.int(), positions)


def device_of(model: MaskPredictor) -> torch.device:
    """Of its norms, which no quantization replaces."""
    return model.model.norm.weight.device
