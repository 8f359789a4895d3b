# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The plan of a request's steps, and that scheduler and worker follow it alike."""

import random

import pytest

from sparsed_vllm.config import Sparsity
from sparsed_vllm.kernels.layout import most_kept
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.reuse import Reuse
from sparsed_vllm.steps import (
    Block,
    Cursor,
    Plan,
    Source,
    dream_shares,
    even_share,
    places_per_step,
    split_steps,
)
from sparsed_vllm.tally import Progress, Tally


def schedule(num_tokens, steps, block_length, threshold=None):
    params = DenoisingParams(num_tokens, steps, block_length, "low_confidence", threshold=threshold)
    return Plan(params, None, prompt_len=3)


@pytest.mark.parametrize("num_blocks", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 8, 33])
@pytest.mark.parametrize("each", [1, 3, 64])
def test_steps_that_divide_evenly_are_split_evenly(num_blocks, size, each):
    assert split_steps(each * num_blocks, [size] * num_blocks) == [each] * num_blocks


def test_one_step_a_token_gives_each_block_a_step_a_place():
    assert split_steps(50, [16, 16, 16, 2]) == [16, 16, 16, 2]


@pytest.mark.parametrize("steps", range(4, 120, 7))
def test_all_steps_are_used_and_every_block_gets_one(steps):
    split = split_steps(steps, [16, 16, 16, 2])
    assert sum(split) == steps
    assert min(split) >= 1


def test_the_last_block_may_be_shorter():
    blocks = schedule(50, 25, 16).blocks
    assert [(block.start, block.end) for block in blocks] == [(0, 16), (16, 32), (32, 48), (48, 50)]


def test_a_step_is_found_in_its_block():
    plan = schedule(32, 16, 8)
    assert plan.num_steps == 16
    assert [plan.at(step).block.start for step in (0, 3, 4, 15)] == [0, 0, 8, 24]
    assert [plan.at(step).block_step for step in (0, 3, 4, 15)] == [0, 3, 0, 3]


def test_work_goes_on_at_the_first_step_of_an_unfinished_block():
    plan = schedule(32, 16, 8)
    assert [plan.resume_step(final) for final in (0, 8, 24, 32)] == [0, 4, 12, 16]


def test_a_threshold_may_need_a_step_for_every_place():
    assert schedule(50, 4, 16, threshold=0.9).num_steps == 50


@pytest.mark.parametrize(("places", "steps"), [(32, 32), (32, 5), (7, 20), (1, 1)])
def test_places_are_spread_evenly_the_odd_ones_first(places, steps):
    shares = [even_share(places, steps, step) for step in range(steps)]
    assert sum(shares) == places
    assert sorted(shares, reverse=True) == shares
    assert shares[0] - shares[-1] <= 1


def test_dream_places_32_in_16_steps_as_its_authors_do():
    counts = places_per_step(Block(0, 32, 16), DenoisingParams(32, 32, 32, "entropy"))
    assert counts == [1, *[2] * 14, 3]


@pytest.mark.parametrize("policy", ["low_confidence", "entropy"])
@pytest.mark.parametrize(("size", "steps"), [(32, 7), (1, 1), (5, 50), (100, 99)])
def test_every_place_is_filled_by_the_last_step(policy, size, steps):
    counts = places_per_step(Block(0, size, steps), DenoisingParams(32, 32, 32, policy))
    assert len(counts) == steps
    assert sum(counts) == size


def test_the_last_share_is_all_that_is_left():
    assert dream_shares(1, 1e-3) == (1.0,)
    assert dream_shares(10, 0.5)[-1] == 1.0


@pytest.mark.parametrize("function", [dream_shares, most_kept])
def test_clients_cannot_have_ever_more_remembered(function):
    for i in range(5000):
        function(3, (1 + i) / 5001)
    assert function.cache_info().currsize < 2000


PLANS = [
    (DenoisingParams(24, 9, 8, "low_confidence"), None, None),
    (DenoisingParams(24, 12, 24, "low_confidence"), Sparsity(0.2, 0.3, 16), None),
    (DenoisingParams(24, 1, 8, "low_confidence", threshold=0.5), None, None),
    (DenoisingParams(24, 6, 8, "low_confidence", threshold=0.5), Sparsity(0.2, 0.3, 16), None),
    (DenoisingParams(24, 12, 8, "low_confidence"), Sparsity(0.2, 0.3, 16, 0.9, 3), None),
    (DenoisingParams(24, 24, 8, "origin"), None, None),
    (DenoisingParams(24, 7, 5, "entropy", early_stop=False), Sparsity(0.5, 0.3, 16), None),
    (DenoisingParams(24, 9, 8, "low_confidence"), None, Reuse(0.1, 2)),
    (DenoisingParams(24, 12, 24, "low_confidence"), Sparsity(0.2, 0.3, 16), Reuse(0.5)),
    (DenoisingParams(24, 12, 24, "entropy"), Sparsity(0.2, 0.3, 16, refresh=4), Reuse(0.1, 1, 4)),
    (DenoisingParams(24, 6, 8, "low_confidence", threshold=0.5), None, Reuse(0, 1, 4)),
    (DenoisingParams(24, 24, 8, "origin"), None, Reuse(0.9999, 1, 3)),
    (DenoisingParams(24, 9, 5, "low_confidence", variable_length=True), None, None),
    (DenoisingParams(24, 12, 8, "origin", variable_length=True), None, Reuse(0.2)),
]


def plan_of(params, sparsity, reuse):
    return Plan(params, sparsity, 7, reuse, shift=int(params.policy == "origin"))


@pytest.mark.parametrize(("params", "sparsity", "reuse"), PLANS, ids=str)
def test_a_plan_s_steps_add_up(params, sparsity, reuse):
    plan = plan_of(params, sparsity, reuse)
    steps = [plan.at(i) for i in range(plan.num_steps)]
    assert [step.is_last for step in steps] == [False] * (len(steps) - 1) + [True]
    ends = [step.block.end if params.variable_length else 24 for step in steps]
    assert [step.length for step in steps] == [7 + end for end in ends]
    assert all(step.num_rows == step.length for step in steps if step.source is Source.FRESH)
    assert (Source.PAGES in {step.source for step in steps}) == (reuse is not None)
    assert steps[-1].may_hand_out
    if plan.pace_is_known:
        assert sum(step.num_filled for step in steps) == 24
        assert all(step.num_filled <= step.num_open for step in steps)
    assert all(step.num_open <= params.block_length for step in steps)


class Engine:
    """Scheduler and worker of one request, as vLLM moves them: steps are sent, and run later."""

    def __init__(self, plan, draw):
        self.plan, self.draw = plan, draw
        self.progress = Progress.of(plan, "request")
        self.worker = None
        self.in_flight = []  # steps that were sent, as the scheduler sees them
        self.handed_out = 0

    def admit(self):
        """It starts or resumes: the worker is told what was handed out, the scheduler knows."""
        self.progress.start()
        self.worker = Cursor(self.plan, self.progress.num_final)

    def send(self):
        if self.progress.steps_left:
            self.in_flight.append(self.progress.plan.at(self.progress.cursor.step))
            Tally().take_step(self.progress)

    def run(self):
        """The worker runs the oldest step that was sent: it must be the one that it expects."""
        if not self.in_flight:
            return
        sent, run = self.in_flight.pop(0), self.worker.advance()
        assert run == sent
        if run.may_hand_out and (run.is_last or self.draw.random() < 0.5):
            size = self.plan.params.block_length if self.plan.params.early_stop else 24
            end = min(self.progress.num_final + size, 24)
            # Handed out are whole blocks, in order; a request that starts over repeats none.
            if run.block_step is None or run.block.end > self.progress.num_final or run.is_last:
                self.progress.num_final = 24 if run.is_last else end

    def preempt(self):
        """Steps on their way are run, and what they hand out counts; then it starts over."""
        while self.in_flight:
            self.run()
        self.worker = None


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize(("params", "sparsity", "reuse"), PLANS, ids=str)
def test_scheduler_and_worker_see_the_same_steps_whatever_befalls_them(
    params, sparsity, reuse, seed
):
    draw = random.Random(seed)
    engine = Engine(plan_of(params, sparsity, reuse), draw)
    lag = draw.choice((1, 2, 3))
    for _ in range(200):
        if engine.worker is None:
            engine.admit()
        engine.send()
        while len(engine.in_flight) >= lag:
            engine.run()
        if draw.random() < 0.05:
            engine.preempt()
        if engine.worker and not engine.progress.steps_left:
            engine.preempt()
            break
    assert engine.progress.num_final <= 24
