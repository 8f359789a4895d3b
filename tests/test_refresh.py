# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Which tokens of the context light steps compute, and where their rows lie in a batch."""

import random

import pytest
import torch

from sparsed_vllm import refresh
from sparsed_vllm.canvases import Canvases
from sparsed_vllm.match import PromptMatch
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.refresh import ContextMass
from sparsed_vllm.reuse import CHOICES, Reuse
from sparsed_vllm.steps import Plan, Source

CPU = torch.device("cpu")


def plan_of(prompt_len, reuse, num_tokens=4, steps=4, block_length=4):
    params = DenoisingParams(num_tokens, steps, block_length, "low_confidence")
    return Plan(params, None, prompt_len, reuse)


def mass_of(rows, longest=64, add_ranks=lambda mass: mass):
    """rows: what is noted of each slot's first tokens"""
    context = ContextMass(len(rows), longest, CPU, add_ranks)
    for slot, row in enumerate(rows):
        context.mass[slot, : len(row)] = torch.tensor(row, dtype=torch.float32)
    return context


def choose(context, plans, slots=None, step=1):
    """The light rows of requests that are all at `step`, as [(row, place, sequence)]."""
    steps = [plan.at(step) for plan in plans]
    starts = [sum(x.num_rows for x in steps[:i]) for i in range(len(steps))]
    light = context.choose(starts, slots or range(len(plans)), steps, plans)
    if light is None:
        return None
    return sorted(zip(*(x.tolist() for x in (light.rows, light.places, light.seqs)), strict=True))


def test_a_light_step_computes_what_drew_most_then_its_canvas():
    plan = plan_of(5, Reuse(0.4))
    context = mass_of([[0.1, 0.5, 0.2, 0.9, 0.3]])
    rows = choose(context, [plan])
    assert rows == [(i, place, 0) for i, place in enumerate([3, 1, 5, 6, 7, 8])]


def test_of_equal_masses_the_first_places_are_chosen():
    context = mass_of([[0.5, 0.7, 0.5, 0.5, 0.7, 0.5]])
    assert [place for _, place, _ in choose(context, [plan_of(6, Reuse(0.6))])][:4] == [1, 4, 0, 2]


def test_masses_of_the_canvas_are_not_in_the_running():
    context = mass_of([[0.1, 0.2, 0.3, 9, 9, 9, 9]])
    assert [place for _, place, _ in choose(context, [plan_of(3, Reuse(0.3))])] == [2, 3, 4, 5, 6]


def test_a_token_that_drew_nothing_comes_before_the_canvas():
    context = mass_of([[0.0, 0.0, 0.0]])
    rows = choose(context, [plan_of(3, Reuse(0.9999))])
    assert [place for _, place, _ in rows] == [0, 1, 2, 3, 4, 5, 6]


def test_a_batch_of_whole_steps_has_no_light_rows():
    plans = [plan_of(5, Reuse(0.4)), plan_of(9, None)]
    assert choose(mass_of([[], []]), plans, step=0) is None
    assert choose(mass_of([[]]), [plan_of(9, None)]) is None


def test_a_share_of_nothing_leaves_the_canvas():
    assert choose(mass_of([[9.0] * 5]), [plan_of(5, Reuse(0))]) == [(i, 5 + i, 0) for i in range(4)]


def test_each_request_has_its_slot_s_mass_and_its_place_in_the_batch():
    whole, light = plan_of(3, None), plan_of(4, Reuse(0.25))
    context = mass_of([[0, 0, 0, 9], [], [0, 9, 0, 0]])
    rows = choose(context, [light, whole, light], slots=[2, 1, 0])
    first = [(i, place, 0) for i, place in enumerate([1, 4, 5, 6, 7])]
    last = [(12 + i, place, 2) for i, place in enumerate([3, 4, 5, 6, 7])]
    assert rows == first + last


def random_plans(draw, count):
    shapes = [(1, 4), (7, 4), (40, 4), (50, 9)]
    reuses = [None, Reuse(0), Reuse(0.1), Reuse(0.5, 2), Reuse(0.9999), Reuse(0.3, 1, 2)]
    return [
        plan_of(prompt_len, draw.choice(reuses), num_tokens, block_length=draw.choice((2, 4)))
        for prompt_len, num_tokens in draw.choices(shapes, k=count)
    ]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("at_once", [10, 100, 1 << 21])
def test_batch_mates_change_no_choice_and_every_row_of_a_light_step_is_named_once(
    monkeypatch, seed, step, at_once
):
    monkeypatch.setattr(refresh, "_RANKED_AT_ONCE", at_once)
    draw = random.Random(seed)
    plans = [plan for plan in random_plans(draw, 12) if plan.num_steps > step]
    # Few values, so that many are equal.
    values = torch.randint(0, 4, (len(plans), 64), generator=torch.Generator().manual_seed(seed))
    context = mass_of(values.tolist())
    together = choose(context, plans, step=step) or []
    start = 0
    for i, plan in enumerate(plans):
        own = [(row - start, place) for row, place, seq in together if seq == i]
        alone = choose(context, [plan], slots=[i], step=step) or []
        assert own == [(row, place) for row, place, _ in alone]
        taken = plan.at(step)
        if taken.source is Source.PAGES:
            assert [row for row, _ in own] == list(range(taken.num_rows))
            assert len({place for _, place in own}) == taken.num_rows
        start += taken.num_rows


def test_ranks_choose_by_the_sum_of_their_heads():
    other = torch.zeros(1, 64)
    other[0, 4] = 1.0
    context = mass_of([[0.9, 0, 0, 0, 0.2]], add_ranks=lambda mass: mass + other[:, :5])
    assert choose(context, [plan_of(5, Reuse(0.2))])[0] == (0, 4, 0)


def test_a_new_step_forgets_the_mass_of_its_requests_only():
    context = mass_of([[1.0], [2.0], [3.0]])
    context.clear([])
    context.clear([0, 2])
    assert context.mass[:, 0].tolist() == [0, 2, 0]


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_no_choice_ranks_more_than_memory_profiling_holds(monkeypatch, share):
    monkeypatch.setattr(refresh, "_RANKED_AT_ONCE", 200)
    plans = [plan_of(n, Reuse(share)) for n in (1, 60, 7, 59, 3, 3, 60)]
    context = mass_of([[]] * len(plans))
    ranked, held, empty = [], [], torch.empty
    best = context._best
    monkeypatch.setattr(context, "_best", lambda *a: ranked.append(best(*a).numel()) or best(*a))
    choose(context, plans)
    monkeypatch.setattr(torch, "empty", lambda n, **_: held.append(n) or empty(0))
    context.hold()
    assert len(ranked) > 1
    assert max(ranked) * refresh._BYTES_RANKED <= held[0] <= 200 * refresh._BYTES_RANKED


@pytest.mark.gpu
@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_takes_no_more_memory_than_profiling_holds(choice):
    plans = [plan_of(4000, Reuse(0.02, choice=choice), 128, 128, 128)] * 600
    canvases = Canvases(600, 128, torch.device("cuda"))
    match = PromptMatch(canvases)
    context = ContextMass(600, 4224, canvases.device, lambda mass: mass, match)
    tokens = torch.randint(0, 50, (600, 4224), dtype=torch.int32, device="cuda")
    match.masked.fill_(True)
    canvases.tokens.random_(0, 50)
    context.mass.uniform_()
    steps = [plan.at(1) for plan in plans]
    starts = [i * steps[0].num_rows for i in range(600)]

    def taken(run):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before

    chosen = taken(lambda: context.choose(starts, range(600), steps, plans, tokens))
    assert 0 < chosen <= taken(context.hold)
