# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Tokens, confidences and places, against the definitions in plain float64."""

import numpy as np
import pytest
import torch

from sparsed_vllm.canvases import Canvases, CanvasPlaces
from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.choice import Forbidden, Noise
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.steps import Plan
from sparsed_vllm.unmasking import choice_of, draws_places

MASK = 7


def params(policy="low_confidence", **rest):
    return DenoisingParams(32, 32, 32, policy, **rest)


def noise(rows, seed=0):
    return Noise(
        torch.full((rows,), seed), torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    )


def choose_tokens(logits, params, forbidden, seed=0):
    drawn = noise(len(logits), seed) if params.temperature > 0 else None
    return api.choose_tokens(logits, choice_of(params), forbidden, drawn)


@pytest.fixture
def logits():
    return torch.randn(40, 50) * 3


@pytest.mark.parametrize("policy", ["low_confidence", "maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_mask_token_is_never_chosen(logits, policy, temperature):
    logits[:, MASK] = 100.0
    tokens, *_ = choose_tokens(logits, params(policy, temperature=temperature), Forbidden(MASK))
    assert (tokens != MASK).all()


@pytest.mark.parametrize("policy", ["low_confidence", "maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_stop_tokens_are_not_chosen_where_the_text_may_not_end(
    logits, policy, temperature, monkeypatch
):
    monkeypatch.setattr("sparsed_vllm.kernels.reference._TILE_ELEMENTS", 150)
    logits[:, 3] = 100.0
    early = torch.arange(40) % 3 == 0
    forbidden = Forbidden(MASK, torch.tensor([3, 5]), early)
    asked = params(policy, temperature=temperature)
    tokens, *_ = choose_tokens(logits, asked, forbidden)
    assert torch.equal(tokens == 3, ~early)
    assert (tokens[early] != 5).all()


def test_confidence_counts_the_mask_token_in_the_softmax(logits):
    tokens, confidence, _ = choose_tokens(logits, params(), Forbidden(MASK))
    probs = logits.double().softmax(-1)
    torch.testing.assert_close(confidence.double(), probs[range(40), tokens], rtol=1e-6, atol=0)


def test_margin_is_the_lead_over_the_second_token(logits):
    _, confidence, _ = choose_tokens(logits, params("topk_margin"), Forbidden(MASK))
    first, second = logits.double().softmax(-1).topk(2).values.T
    torch.testing.assert_close(confidence.double(), first - second, rtol=0, atol=1e-6)


def test_entropy_is_negated(logits):
    _, confidence, _ = choose_tokens(logits, params("entropy"), Forbidden(MASK))
    probs = logits.double().softmax(-1)
    torch.testing.assert_close(
        confidence.double(), (probs * probs.log()).sum(-1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("policy", ["low_confidence", "random", "maskgit_plus"])
def test_logits_are_only_read(logits, policy, temperature):
    before = logits.clone()
    forbidden = Forbidden(MASK, torch.tensor([2]), torch.ones(len(logits), dtype=torch.bool))
    choose_tokens(logits, params(policy, temperature=temperature), forbidden)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_before_the_softmax(logits, dtype):
    narrow = logits.to(dtype)
    for got, want in zip(
        choose_tokens(narrow, params(), Forbidden(MASK)),
        choose_tokens(narrow.float(), params(), Forbidden(MASK)),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("policy", ["low_confidence", "maskgit_plus"])
def test_tokens_are_drawn_with_their_tempered_probability(policy):
    logits = torch.randn(6).expand(40_000, 6)
    tokens, *_ = choose_tokens(logits, params(policy, temperature=0.7), Forbidden(5))
    drawn = tokens.bincount(minlength=6) / 40_000
    allowed = logits[0].clone()
    allowed[5] = -torch.inf
    torch.testing.assert_close(drawn, (allowed / 0.7).softmax(-1), rtol=0, atol=0.01)


def test_top_k_and_top_p_keep_the_likeliest(logits):
    best = logits.index_fill(1, torch.tensor([MASK]), -torch.inf).argsort(-1, descending=True)
    tokens, *_ = choose_tokens(
        logits, params("maskgit_plus", temperature=5.0, top_k=3), Forbidden(MASK)
    )
    assert (best[:, :3] == tokens[:, None]).any(-1).all()
    tokens, confidence, _ = choose_tokens(
        logits, params("maskgit_plus", temperature=1.0, top_p=1e-6), Forbidden(MASK)
    )
    assert torch.equal(tokens, best[:, 0])
    assert (confidence == 1).all()


def test_a_seed_repeats_the_draw_and_another_does_not(logits):
    hot = params(temperature=1.0)
    first, again, other = (
        choose_tokens(logits, hot, Forbidden(MASK), seed)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_large_vocabularies_are_worked_on_in_parts(logits, monkeypatch):
    whole = choose_tokens(logits, params(), Forbidden(MASK))
    monkeypatch.setattr("sparsed_vllm.kernels.reference._TILE_ELEMENTS", 150)
    parts = choose_tokens(logits, params(), Forbidden(MASK))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def chosen_of(confidences, requests, seed=0):
    """Which places one step fills, bool of each request; of canvases that are all masked.

    confidences [num_reqs][places];  requests: their parameters
    """
    canvases = Canvases(len(requests), max(map(len, confidences)), torch.device("cpu"))
    slots = range(len(requests))
    plans = [Plan(params, None, 1) for params in requests]
    canvases.masked[list(slots)] = torch.arange(canvases.longest) < torch.tensor(
        [params.num_tokens for params in requests]
    ).unsqueeze(1)
    nowhere = CanvasPlaces(*np.zeros((4, len(requests)), np.int64))
    step = canvases.open(slots, requests, [plan.at(0) for plan in plans], slots, nowhere)
    draws = any(map(draws_places, requests))
    uniform = api.draw_uniform(noise(len(step.places), seed)) if draws else None
    chosen = fill(canvases, step, torch.cat(confidences), uniform)
    return list(chosen.split([len(part) for part in confidences]))


def places(count, filled, policy="low_confidence", **rest):
    """Of a request whose first step fills `filled` of `count` places."""
    return DenoisingParams(count, count // filled, count, policy, **rest)


def test_the_surest_places_are_filled():
    one = torch.tensor([0.1, 0.9, 0.2, 0.5])
    other = torch.tensor([0.3, 0.1])
    chosen = chosen_of([one, other], [places(4, 2), places(2, 1)])
    assert [x.tolist() for x in chosen] == [[0, 1, 0, 1], [1, 0]]


def test_of_equally_sure_places_the_first_are_filled():
    (chosen,) = chosen_of([torch.ones(5)], [places(5, 2)])
    assert chosen.tolist() == [1, 1, 1, 0, 0]  # five places in two steps: three in the first


def test_a_threshold_fills_all_that_reach_it_and_at_least_one():
    confidence = torch.tensor([0.1, 0.9, 0.2, 0.5])
    for threshold, filled in ((0.5, [0, 1, 0, 1]), (0.95, [0, 1, 0, 0]), (1e-9, [1, 1, 1, 1])):
        (chosen,) = chosen_of([confidence], [places(4, 1, threshold=threshold)])
        assert chosen.tolist() == filled


def test_a_threshold_is_reached_in_the_precision_of_a_confidence():
    (chosen,) = chosen_of([torch.tensor([1.0, 0.9])], [places(2, 1, threshold=0.9)])
    assert chosen.tolist() == [1, 1]


@pytest.mark.parametrize("alg_temp", [1e-6, 0.3, 100.0])
def test_drawn_places_are_as_many_as_asked(alg_temp):
    confidence = torch.tensor([0.1, 0.9, 0.2, 0.5, 0.3, 0.4])
    drawn = places(6, 2, "entropy", alg_temp=alg_temp)
    count = Plan(drawn, None, 1).at(0).num_filled
    for seed in range(50):
        (chosen,) = chosen_of([confidence], [drawn], seed)
        assert chosen.sum() == count
        assert chosen[1] or alg_temp > 1e-6


def test_places_are_drawn_with_their_tempered_probability():
    confidence = torch.tensor([0.1, 0.9, 0.2, 0.5])
    drawn = DenoisingParams(4, 4, 4, "entropy", alg_temp=0.7, eps=0.1)
    assert Plan(drawn, None, 1).at(1).num_filled == 1
    counts = torch.zeros(4)
    for seed in range(3000):
        (chosen,) = chosen_of_step(1, confidence, drawn, seed)
        counts += chosen
    torch.testing.assert_close(counts / 3000, (confidence / 0.7).softmax(-1), rtol=0, atol=0.04)


def chosen_of_step(index, confidence, params, seed):
    """As chosen_of, in another step than the first."""
    canvases = Canvases(1, params.num_tokens, torch.device("cpu"))
    canvases.masked[0] = True
    step = Plan(params, None, 1).at(index)._replace(num_open=len(confidence))
    canvas = canvases.open([0], [params], [step], [0], CanvasPlaces.alone())
    uniform = api.draw_uniform(noise(len(confidence), seed))
    return [fill(canvases, canvas, confidence, uniform)]


def fill(canvases, step, confidence, uniform):
    """Fill places of a step with any tokens; which, bool [num_rows]."""
    tokens = torch.zeros(len(confidence), dtype=torch.int64)
    return canvases.fill(step, tokens, confidence, torch.ones(len(confidence)), uniform)


def test_origin_draws_each_open_place_by_itself():
    params = DenoisingParams(20_000, 3, 20_000, "origin")
    share = Plan(params, None, 1).at(0).share
    (chosen,) = chosen_of([torch.ones(20_000)], [params])
    assert abs(chosen.float().mean() - share) < 0.02
    (chosen,) = chosen_of_step(2, torch.ones(20_000), params, 0)
    assert chosen.all()


def test_chance_stands_in_for_confidence_where_the_policy_is_random():
    confidence = torch.arange(32.0) / 32
    kinds = [places(32, 4), places(32, 4, "random")]
    sure, drawn = chosen_of([confidence, confidence], kinds)
    assert sure.nonzero().flatten().tolist() == [28, 29, 30, 31]
    assert drawn.sum() == 4 and not torch.equal(sure, drawn)
