# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What an operator allows, and what a client is told who asks for more."""

from types import SimpleNamespace

import pytest

from sparsed_vllm.families import LLADA
from sparsed_vllm.limits import DEFAULT_MAX_TOKENS, Limits, wants_early_errors
from sparsed_vllm.params import BadRequest, parse_params


def limits(**given):
    return Limits.of({"denoising": given})


def parse(limits, max_tokens=32, **extra):
    params = parse_params(
        LLADA,
        max_tokens=max_tokens,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        ignore_eos=False,
        extra_args=extra,
        max_steps=limits.max_steps,
    )
    limits.check_threshold(params)
    return params


@pytest.mark.parametrize("additional", [{}, None, {"sparsed": {}}, {"denoising": {}}], ids=str)
def test_there_are_no_limits_unless_set(additional):
    assert Limits.of(additional) == Limits()
    Limits().check_length(10**9)
    Limits().check_fields({"steps": 1, "use_sparsed": 1})
    assert parse(Limits(), steps=128).steps == 128


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("default_max_tokens", 0),
        ("max_tokens", "512"),
        ("max_tokens", None),
        ("max_steps", 1.5),
        ("max_steps", True),
        ("request_fields", "steps"),
        ("request_fields", ["steps", "stepz"]),
        ("request_fields", [["steps"]]),
        ("max_step", 5),
    ],
)
def test_bad_limits_are_refused_by_name(key, value):
    with pytest.raises(BadRequest, match=rf"denoising\.{key} must be") as refused:
        limits(**{key: value})
    assert repr(value) in str(refused.value)


def test_the_longest_canvas_is_the_operator_s():
    limits(max_tokens=64).check_length(64)
    with pytest.raises(BadRequest, match="max_tokens must be at most 64 on this server, got 65"):
        limits(max_tokens=64).check_length(65)


def test_a_request_that_names_no_length_gets_the_default():
    assert Limits().default_length(None) == DEFAULT_MAX_TOKENS
    assert Limits().default_length(300) == 300
    assert limits(default_max_tokens=50).default_length(300) == 50
    assert limits(max_tokens=40).default_length(None) == 40


def test_steps_stay_within_the_limit_where_the_client_says_nothing():
    assert parse(limits(max_steps=10)).steps == 10
    assert parse(limits(max_steps=100)).steps == 32
    assert parse(limits(max_steps=10), steps=10).steps == 10
    with pytest.raises(BadRequest, match=r"steps must be an integer in \[1, 10\] \(this server"):
        parse(limits(max_steps=10), steps=11)
    with pytest.raises(BadRequest, match="one for each block"):
        parse(limits(max_steps=10), block_length=2)


def test_a_threshold_may_take_a_step_for_each_token():
    assert parse(limits(max_steps=32), threshold=0.9).threshold == 0.9
    with pytest.raises(BadRequest, match="max_tokens must be at most 10 with a threshold"):
        parse(limits(max_steps=10), threshold=0.9)


def test_clients_may_set_what_the_operator_lists():
    some = limits(request_fields=["steps", "use_sparsed"])
    some.check_fields({"steps": 4, "use_sparsed": 1})
    with pytest.raises(BadRequest, match="lets clients set steps, use_sparsed, got 'random'"):
        some.check_fields({"remasking": "random"})
    with pytest.raises(BadRequest, match="set none of these parameters"):
        limits(request_fields=[]).check_fields({"steps": 4})


def test_early_errors_are_off_unless_the_operator_of_one_of_our_models_asks():
    def wants(architecture, settings):
        model = SimpleNamespace(architecture=architecture)
        return wants_early_errors(SimpleNamespace(model_config=model, additional_config=settings))

    asked = {"denoising": {"early_errors": 1}}
    assert wants("DreamModel", asked)
    assert not wants("DreamModel", {})
    assert not wants("DreamModel", {"denoising": {"early_errors": 0}})
    assert not wants("LlamaForCausalLM", asked)
    with pytest.raises(BadRequest, match=r"denoising\.early_errors must be 0 or 1"):
        wants("DreamModel", {"denoising": {"early_errors": 2}})
