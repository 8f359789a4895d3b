# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The last layer runs only for the rows that are read."""

import random

import pytest
import torch
from vllm import SamplingParams

from sparsed_vllm.batch import RowWindows
from sparsed_vllm.models.network import Transformer

pytestmark = pytest.mark.engine

SPARSE = {"use_sparsed": 1, "sparsed_block_size": 16}


def generate(llm, lengths, extras):
    """[len(lengths)] the tokens of prompts of these lengths, each with parameters of its own."""
    draw = random.Random(5)
    prompts = [[draw.randrange(256) for _ in range(length)] for length in lengths]
    params = [
        SamplingParams(
            temperature=0, max_tokens=32, ignore_eos=True, detokenize=False, extra_args=extra
        )
        for extra in extras
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(requests, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def rows_of_feed_forwards(llm, length, extra):
    """[num_steps] how many rows the feed-forward of each layer has."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    layers = executor.driver_worker.worker.model_runner.model.model.layers
    rows = [[] for _ in layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(len(given[0])))
        for layer, seen in zip(layers, rows, strict=True)
    ]
    generate(llm, [length], [extra])
    for hook in hooks:
        hook.remove()
    return list(zip(*rows, strict=True))


def spoil_the_others(monkeypatch):
    """Fill with NaN what the last layer left out; returns the list of how much each step did."""
    run, left_out = Transformer.run, []

    def spoiled(self, input_ids, positions, rows):
        hidden_states = run(self, input_ids, positions, rows)
        if rows is not None:
            left_out.append(len(input_ids) - len(rows))
            others = torch.ones_like(hidden_states[:, 0], dtype=torch.bool)
            hidden_states[others.index_fill(0, rows, False)] = torch.nan
        return hidden_states

    monkeypatch.setattr(Transformer, "run", spoiled)
    return left_out


def test_a_dense_step_ends_in_the_blocks_of_its_open_places(llada):
    # Places 0..7 and 8..15 lie before token 384, the others after it.
    rows = rows_of_feed_forwards(llada, 368, {"steps": 4, "block_length": 8})
    assert rows == [(400, 128), (400, 128), (400, 16), (400, 16)]


def test_a_recording_step_ends_in_all_blocks_and_a_sparse_one_in_few(llada):
    rows = rows_of_feed_forwards(llada, 300, {"steps": 4, "sparsed_skip": 0.3, **SPARSE})
    assert rows == [(332, 76), (332, 76), (332, 332), (332, 76)]


def test_a_dream_reads_from_the_place_before(dream):
    rows = rows_of_feed_forwards(dream, 384, {"steps": 2, "alg": "entropy", "block_length": 16})
    assert rows == [(416, 160), (416, 32)]


LLADA_MIX = [
    {"steps": 8, "block_length": 8},
    {"steps": 8, **SPARSE},
    {"steps": 16, "block_length": 8, **SPARSE, "sparsed_skip": 0.5},
    {"threshold": 0.05, "block_length": 8},
    {"threshold": 0.05, **SPARSE, "sparsed_block_size": 128},
    {"steps": 16, "sparsed_skip": 0, **SPARSE, "sparsed_block_size": 64},
]
DREAM_MIX = [
    {"steps": 8, "alg": "origin", "block_length": 4},
    {"steps": 8, "alg": "entropy", **SPARSE},
    {"threshold": 0.05, "block_length": 8},
]
LENGTHS = (1, 120, 128, 250, 301, 470)


@pytest.mark.parametrize(("family", "mix"), [("llada", LLADA_MIX), ("dream", DREAM_MIX)])
def test_tokens_are_those_of_a_last_layer_that_leaves_nothing_out(
    request, monkeypatch, family, mix
):
    llm = request.getfixturevalue(family)
    extras = [mix[i % len(mix)] for i in range(len(LENGTHS))]
    with monkeypatch.context() as patch:
        left_out = spoil_the_others(patch)
        few = generate(llm, LENGTHS, extras)
        assert left_out
        patch.setattr(RowWindows, "of", lambda *_: None)
        left_out.clear()
        assert generate(llm, LENGTHS, extras) == few
        assert not left_out
