# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The shipped model answers through the engine as the quality bench says it does."""

import pytest
import torch
from needle import checkpoint
from quality.answers import Engine, Harness, load
from quality.methods import METHODS
from quality.questions import draw, mark

pytestmark = pytest.mark.engine

SIZES = {"canvas": 32, "steps": 16, "block_size": 16}


FEW_STEPS = {**SIZES, "steps": 8}


@pytest.fixture(scope="module")
def harness():
    return Harness(load(checkpoint.SHIPPED, torch.device("cpu")), **FEW_STEPS)


@pytest.mark.parametrize("name", ["dense", "sparsed-0.3", "sparsed-0.1", "no-warm-up"])
def test_the_engine_gives_the_tokens_of_the_bench(needle, harness, name):
    engine, method = Engine(needle, **FEW_STEPS), METHODS[name]
    questions = [draw(task, 200, 32, 0) for task in ("multikey", "multivalue", "common")]
    assert engine.answer(method, questions)[0] == harness.answer(method, questions)[0]


def test_the_model_finds_its_needles_dense_and_sparse(needle):
    engine = Engine(needle, **SIZES)
    questions = [draw(task, 400, 32, 0) for task in ("single", "multikey")]
    for name in ("dense", "sparsed-0.3"):
        given, _ = engine.answer(METHODS[name], questions)
        assert all(mark(q, tokens).exact for q, tokens in zip(questions, given, strict=True))


def test_the_model_of_long_texts_looks_up_twice():
    harness = Harness(load(checkpoint.LONG, torch.device("cpu")), **SIZES)
    questions = [draw("twohop", 300, 32, i) for i in range(2)]
    given, _ = harness.answer(METHODS["dense"], questions)
    assert all(mark(q, tokens).exact for q, tokens in zip(questions, given, strict=True))
