# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Choosing by match: rare prompt tokens whose id was just filled, alone and beside attention."""

import random
from fractions import Fraction

import pytest
import torch

from sparsed_vllm.canvases import Canvases, NewCanvas
from sparsed_vllm.match import PromptMatch
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.refresh import ContextMass
from sparsed_vllm.reuse import Reuse
from sparsed_vllm.steps import Plan

CPU = torch.device("cpu")
CANVAS, LONGEST = 6, 64


def plan_of(prompt_len, choice, share=0.3, num_tokens=CANVAS):
    params = DenoisingParams(num_tokens, num_tokens, num_tokens, "low_confidence")
    return Plan(params, None, prompt_len, Reuse(share, choice=choice))


class Requests:
    """Requests on a worker: prompts [num_slots] lists of ids;  plans: theirs."""

    def __init__(self, prompts, plans):
        self.canvases = Canvases(len(prompts), CANVAS, CPU)
        self.canvases.add([NewCanvas(i, plan.params.num_tokens, 0) for i, plan in enumerate(plans)])
        self.tokens = torch.full((len(prompts), LONGEST), 7, dtype=torch.int32)  # left by others
        for slot, prompt in enumerate(prompts):
            self.tokens[slot, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        match = PromptMatch(self.canvases)
        self.context = ContextMass(len(prompts), LONGEST, CPU, lambda mass: mass, match)
        self.plans = plans
        self.renew(range(len(prompts)))

    def renew(self, slots, step=0):
        steps = [self.plans[slot].at(step) for slot in slots]
        self.context.renew(list(slots), steps, [self.plans[slot] for slot in slots])

    def fill(self, slot, filled):
        """filled: {place of the canvas: id}"""
        for place, token in filled.items():
            self.canvases.tokens[slot, place] = token
            self.canvases.masked[slot, place] = False

    def choices(self, slots=(0,), step=1):
        """Each request's chosen places, the best first."""
        plans = [self.plans[slot] for slot in slots]
        steps = [plan.at(step) for plan in plans]
        starts = [sum(x.num_rows for x in steps[:i]) for i in range(len(steps))]
        light = self.context.choose(starts, list(slots), steps, plans, self.tokens)
        rows = sorted(zip(light.rows.tolist(), light.places.tolist(), strict=True))
        return [
            [place for _, place in rows[start : start + taken.num_chosen]]
            for start, taken in zip(starts, steps, strict=True)
        ]


def test_tokens_that_were_filled_are_chosen_the_rarest_first():
    requests = Requests([[5, 6, 7, 5, 8, 9, 7, 5, 1, 1]], [plan_of(10, "match", share=0.5)])
    requests.fill(0, {0: 7, 3: 8, 4: 40})
    assert requests.choices() == [[4, 2, 6, 0, 1]]  # 8 once, 7 twice, then by place


def test_what_was_known_at_the_last_renewal_counts_no_more():
    requests = Requests([[5, 6, 7, 8, 9]], [plan_of(5, "match", share=0.2)])
    requests.fill(0, {0: 7})
    assert requests.choices() == [[2]]
    requests.renew([0], step=1)
    requests.fill(0, {1: 9})
    assert requests.choices(step=2) == [[4]]


def test_a_step_that_computes_nothing_of_the_prompt_renews_nothing():
    plan = plan_of(5, "match", share=0.2)
    requests = Requests([[5, 6, 7, 8, 9]], [plan])
    requests.plans = [Plan(plan.params, None, 5, Reuse(0.2, 2, choice="match"))]
    requests.fill(0, {0: 7})
    requests.renew([0], step=1)
    assert requests.choices(step=2) == [[2]]


def test_a_token_behind_the_prompt_matches_nothing():
    requests = Requests([[5, 6]], [plan_of(2, "match", share=0.5)])
    requests.fill(0, {0: 7})
    assert requests.choices() == [[0]]


def test_by_both_adds_shares_of_attention_and_match():
    requests = Requests([[5, 6, 7, 8, 9]], [plan_of(5, "both", share=0.4)])
    requests.context.mass[0, :5] = torch.tensor([3.0, 5.0, 1.0, 0.5, 0.5])
    requests.fill(0, {0: 7, 1: 8, 2: 50})
    assert requests.choices() == [[2, 3]]  # 0.1 + 0.5, 0.05 + 0.5; then 0.5
    requests.plans = [plan_of(5, "both", share=0.6)]
    assert requests.choices() == [[2, 3, 1]]


def test_by_both_is_by_attention_where_nothing_matches():
    requests = Requests([[5, 6, 7, 8, 9]], [plan_of(5, "both", share=0.4)])
    requests.context.mass[0, :5] = torch.tensor([3.0, 5.0, 1.0, 0.5, 0.5])
    assert requests.choices() == [[1, 0]]


def scores(prompt, filled, mass):
    """By match and by both, in exact numbers."""
    match = [Fraction(token in filled, prompt.count(token)) for token in prompt]
    mass = [Fraction(x) for x in mass]
    both = [a / (sum(mass) or 1) + b / (sum(match) or 1) for a, b in zip(mass, match, strict=True)]
    return {"match": match, "both": both, "attention": mass}


@pytest.mark.parametrize("seed", range(10))
def test_choices_are_those_of_exact_numbers_in_any_batch(seed):
    draw = random.Random(seed)
    prompts = [[draw.randrange(12) for _ in range(draw.choice((1, 9, 30, 58)))] for _ in range(9)]
    choices = [draw.choice(("attention", "match", "both")) for _ in prompts]
    plans = [plan_of(len(p), choice) for p, choice in zip(prompts, choices, strict=True)]
    requests, expected, worth = Requests(prompts, plans), [], []
    for slot, prompt in enumerate(prompts):
        # Sixteenths, so that sums are exact; few, so that many are equal.
        mass = [draw.randrange(4) / 16 for _ in prompt]
        requests.context.mass[slot, : len(prompt)] = torch.tensor(mass)
        filled = {place: draw.randrange(15) for place in draw.sample(range(CANVAS), 3)}
        requests.fill(slot, filled)
        by = scores(prompt, set(filled.values()), mass)[choices[slot]]
        order = sorted(range(len(prompt)), key=lambda place: (-by[place], place))
        expected.append(order[: plans[slot].at(1).num_chosen])
        worth.append(lambda places, by=by: [float(by[place]) for place in places])
    alone = [requests.choices([slot])[0] for slot in range(9)]
    order = draw.sample(range(9), 9)
    assert requests.choices(order) == [alone[slot] for slot in order]
    for slot, places in enumerate(expected):
        if choices[slot] != "both":
            assert alone[slot] == places
        else:  # the shares are rounded, so what is equal in exact numbers may come in any order
            assert worth[slot](alone[slot]) == pytest.approx(worth[slot](places))
