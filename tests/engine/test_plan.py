# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Scheduler and worker take the same steps, whatever befalls the requests."""

import random

import pytest
from vllm import SamplingParams

from sparsed_vllm.model_state import DenoisingModelState
from sparsed_vllm.steps import Phase
from sparsed_vllm.tally import Tally

pytestmark = pytest.mark.engine

STYLES = [
    {},
    {"steps": 5, "block_length": 4},
    {"threshold": 0.05, "block_length": 4},
    {"steps": 8, "use_sparsed": 1, "sparsed_block_size": 16},
    {"threshold": 0.05, "use_sparsed": 1, "sparsed_skip": 0},
    {"early_stop": 0, "block_length": 3},
    {"variable_length": 1, "block_length": 4},
]


@pytest.fixture
def steps(monkeypatch):
    """(sent, run): the steps that the scheduler sent and those that the worker ran, in order."""
    sent, run = [], []
    take, plan = Tally.take_step, DenoisingModelState._plan

    def noting_sent(self, progress):
        sent.append(progress.plan.at(progress.cursor.step))
        take(self, progress)

    def noting_run(self, input_batch, requests):
        batch = plan(self, input_batch, requests)
        run.append(list(batch.steps))
        return batch

    monkeypatch.setattr(Tally, "take_step", noting_sent)
    monkeypatch.setattr(DenoisingModelState, "_plan", noting_run)
    return sent, run


@pytest.mark.parametrize("name", ["llada", "async_llada"])
@pytest.mark.parametrize("seed", range(3))
def test_the_worker_runs_the_steps_that_the_scheduler_sent(request, steps, name, seed):
    engine = request.getfixturevalue(name).llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    sent, run = steps
    draw, count = random.Random(seed), 0
    while count < 20 or engine.has_unfinished_requests():
        if count < 20 and draw.random() < 0.5:
            add(engine, f"{count}", draw)
            count += 1
        if draw.random() < 0.1:
            engine.abort_request([f"{draw.randrange(20)}"])
        if draw.random() < 0.08:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        engine.step()
    ran = [step for batch in run for step in batch]
    for batch in run:
        together, sent = sent[: len(batch)], sent[len(batch) :]
        assert sorted(map(repr, together)) == sorted(map(repr, batch))
    assert not sent
    assert len(ran) > 100
    assert {step.phase for step in ran} == set(Phase)


def add(engine, name, draw):
    params = SamplingParams(
        temperature=draw.choice((0.0, 0.8)),
        seed=draw.randrange(9),
        max_tokens=draw.choice((8, 13)),
        ignore_eos=True,
        detokenize=False,
        extra_args=draw.choice(STYLES),
    )
    prompt = [draw.randrange(256) for _ in range(draw.choice((1, 30, 140)))]
    engine.add_request(name, {"prompt_token_ids": prompt}, params)
