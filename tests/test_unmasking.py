# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Tokens, confidences and places, against the definitions in plain float64."""

import pytest
import torch

from sparsed_vllm.kernels.choice import Forbidden
from sparsed_vllm.kernels.layout import most_kept
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.phases import Block
from sparsed_vllm.unmasking import (
    choose_places,
    choose_tokens,
    draw_places,
    dream_shares,
    places_per_step,
)

MASK = 7


def params(policy="low_confidence", **rest):
    return DenoisingParams(32, 32, 32, policy, **rest)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def logits():
    return torch.randn(40, 50) * 3


@pytest.mark.parametrize("policy", ["low_confidence", "maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_mask_token_is_never_chosen(logits, policy, temperature):
    logits[:, MASK] = 100.0
    tokens, *_ = choose_tokens(
        logits, params(policy, temperature=temperature), Forbidden(MASK), generator()
    )
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
    tokens, *_ = choose_tokens(logits, asked, forbidden, generator())
    assert torch.equal(tokens == 3, ~early)
    assert (tokens[early] != 5).all()


def test_confidence_counts_the_mask_token_in_the_softmax(logits):
    tokens, confidence, _ = choose_tokens(logits, params(), Forbidden(MASK), generator())
    probs = logits.double().softmax(-1)
    torch.testing.assert_close(confidence.double(), probs[range(40), tokens], rtol=1e-6, atol=0)


def test_margin_is_the_lead_over_the_second_token(logits):
    _, confidence, _ = choose_tokens(logits, params("topk_margin"), Forbidden(MASK), generator())
    first, second = logits.double().softmax(-1).topk(2).values.T
    torch.testing.assert_close(confidence.double(), first - second, rtol=0, atol=1e-6)


def test_entropy_is_negated(logits):
    _, confidence, _ = choose_tokens(logits, params("entropy"), Forbidden(MASK), generator())
    probs = logits.double().softmax(-1)
    torch.testing.assert_close(
        confidence.double(), (probs * probs.log()).sum(-1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("policy", ["low_confidence", "random", "maskgit_plus"])
def test_logits_are_only_read(logits, policy, temperature):
    before = logits.clone()
    forbidden = Forbidden(MASK, torch.tensor([2]), torch.ones(len(logits), dtype=torch.bool))
    choose_tokens(logits, params(policy, temperature=temperature), forbidden, generator())
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_before_the_softmax(logits, dtype):
    narrow = logits.to(dtype)
    for got, want in zip(
        choose_tokens(narrow, params(), Forbidden(MASK), generator()),
        choose_tokens(narrow.float(), params(), Forbidden(MASK), generator()),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("policy", ["low_confidence", "maskgit_plus"])
def test_tokens_are_drawn_with_their_tempered_probability(policy):
    logits = torch.randn(6).expand(40_000, 6)
    tokens, *_ = choose_tokens(logits, params(policy, temperature=0.7), Forbidden(5), generator())
    drawn = tokens.bincount(minlength=6) / 40_000
    allowed = logits[0].clone()
    allowed[5] = -torch.inf
    torch.testing.assert_close(drawn, (allowed / 0.7).softmax(-1), rtol=0, atol=0.01)


def test_top_k_and_top_p_keep_the_likeliest(logits):
    best = logits.index_fill(1, torch.tensor([MASK]), -torch.inf).argsort(-1, descending=True)
    tokens, *_ = choose_tokens(
        logits, params("maskgit_plus", temperature=5.0, top_k=3), Forbidden(MASK), generator()
    )
    assert (best[:, :3] == tokens[:, None]).any(-1).all()
    tokens, confidence, _ = choose_tokens(
        logits, params("maskgit_plus", temperature=1.0, top_p=1e-6), Forbidden(MASK), generator()
    )
    assert torch.equal(tokens, best[:, 0])
    assert (confidence == 1).all()


def test_a_seed_repeats_the_draw_and_another_does_not(logits):
    hot = params(temperature=1.0)
    first, again, other = (
        choose_tokens(logits, hot, Forbidden(MASK), generator(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_large_vocabularies_are_worked_on_in_parts(logits, monkeypatch):
    whole = choose_tokens(logits, params(), Forbidden(MASK), generator())
    monkeypatch.setattr("sparsed_vllm.kernels.reference._TILE_ELEMENTS", 150)
    parts = choose_tokens(logits, params(), Forbidden(MASK), generator())
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_the_surest_places_are_filled():
    confidence = torch.tensor([0.1, 0.9, -torch.inf, 0.5])
    assert choose_places(confidence, 2, params(), generator()).tolist() == [0, 1, 0, 1]
    assert not choose_places(confidence, 0, params(), generator()).any()


def test_a_threshold_fills_all_that_reach_it_and_at_least_one():
    confidence = torch.tensor([0.1, 0.9, -torch.inf, 0.5])
    for threshold, filled in ((0.5, [0, 1, 0, 1]), (0.95, [0, 1, 0, 0]), (1e-9, [1, 1, 0, 1])):
        chosen = choose_places(confidence, 0, params(threshold=threshold), generator())
        assert chosen.tolist() == filled
    closed = torch.full((3,), -torch.inf)
    assert not choose_places(closed, 0, params(threshold=0.5), generator()).any()


@pytest.mark.parametrize("alg_temp", [1e-6, 0.3, 100.0])
def test_drawn_places_are_open_and_as_many_as_asked(alg_temp):
    confidence = torch.tensor([0.1, 0.9, -torch.inf, 0.5, -torch.inf])
    for seed in range(50):
        drawn = params("entropy", alg_temp=alg_temp)
        chosen = choose_places(confidence, 2, drawn, generator(seed))
        assert chosen.sum() == 2
        assert not chosen[[2, 4]].any()


def test_origin_draws_each_open_place_by_itself():
    is_open = torch.ones(20_000, dtype=torch.bool)
    is_open[::2] = False
    chosen = draw_places(is_open, 0.3, generator())
    assert not chosen[::2].any()
    assert abs(chosen[1::2].float().mean() - 0.3) < 0.02
    assert torch.equal(draw_places(is_open, 1.0, generator()), is_open)


def test_dream_places_32_in_16_steps_as_its_authors_do():
    counts = places_per_step(Block(0, 32, 16), params("entropy"))
    assert counts == [1, *[2] * 14, 3]


@pytest.mark.parametrize("policy", ["low_confidence", "entropy"])
@pytest.mark.parametrize(("size", "steps"), [(32, 7), (1, 1), (5, 50), (100, 99)])
def test_every_place_is_filled_by_the_last_step(policy, size, steps):
    counts = places_per_step(Block(0, size, steps), params(policy))
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
