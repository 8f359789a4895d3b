# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What a request may ask, and what it is told when it asks for something else."""

import math
from pathlib import Path

import pytest
import torch

from sparsed_vllm.config import REQUEST_FIELDS, SparseConfig, choose_sparsity
from sparsed_vllm.families import DREAM, FAMILIES, LLADA
from sparsed_vllm.params import BadRequest, check_periods, parse_params, request_fields

ROOT = Path(__file__).parents[1]
NUMBERS = [0, -1, 1.5, "8", True, None, [4], math.nan, 10**9]


def parse(family=LLADA, *, max_tokens=32, temperature=0.0, top_p=1.0, top_k=0, **rest):
    return parse_params(
        family,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        ignore_eos=rest.pop("ignore_eos", False),
        min_tokens=rest.pop("min_tokens", 0),
        stop_tokens=rest.pop("stop_tokens", ()),
        extra_args=rest,
    )


def refusal(*args, **kwargs):
    with pytest.raises(BadRequest) as refused:
        parse(*args, **kwargs)
    return refused.value


def test_the_defaults_are_one_step_a_token_in_one_block():
    params = parse()
    assert (params.steps, params.block_length, params.policy) == (32, 32, "low_confidence")
    assert parse(DREAM).policy == "origin"


@pytest.mark.parametrize("steps", NUMBERS)
def test_steps_that_are_no_number_of_steps_are_refused(steps):
    error = refusal(steps=steps)
    assert error.field == "steps"
    assert "an integer in [1, 128]" in str(error)
    assert repr(steps) in str(error)


@pytest.mark.parametrize("length", [*NUMBERS, 33])
def test_a_block_holds_between_one_place_and_all(length):
    assert "an integer in [1, 32]" in str(refusal(block_length=length))


def test_every_block_needs_a_step():
    assert parse(steps=4, block_length=8).steps == 4
    assert "at least 4" in str(refusal(steps=3, block_length=8))


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, "0.9", math.nan, math.inf, [0.5], True])
def test_a_threshold_outside_its_range_is_refused(threshold):
    assert "a number in (0, 1]" in str(refusal(threshold=threshold))


def test_a_threshold_takes_the_probability_of_the_token():
    assert parse(DREAM, threshold=0.9).policy == "maskgit_plus"
    assert parse(threshold=1).threshold == 1.0
    assert refusal(DREAM, threshold=0.9, alg="entropy").field == "alg"
    assert refusal(threshold=0.9, remasking="random").field == "remasking"
    assert refusal(DREAM, threshold=0.9, alg_temp=0.1).field == "alg_temp"


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        (LLADA, "remasking", "entropy"),
        (LLADA, "remasking", 1),
        (DREAM, "alg", "low_confidence"),
        (DREAM, "alg", "ENTROPY"),
        (DREAM, "alg_temp", -1),
        (DREAM, "alg_temp", 10**400),
        (DREAM, "eps", 0),
        (DREAM, "eps", 1),
        (LLADA, "early_stop", 2),
        (LLADA, "early_stop", "yes"),
        (LLADA, "cfg_scale", 1.5),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(family, field, value):
    error = refusal(family, **{field: value})
    assert error.field == field
    assert repr(value) in str(error)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("scale", [1, 0.5, -1])
def test_guidance_is_refused_with_a_way_out(family, scale):
    message = str(refusal(family, cfg_scale=scale))
    assert f"got {scale!r}. Leave it out" in message
    page = "docs/requests.md"
    assert page in message
    assert "- **`cfg_scale`** other than 0 is refused." in (ROOT / page).read_text()


def endless():
    value = []
    value.append(value)
    return value


NASTY = [
    None,
    math.nan,
    -math.inf,
    10**5000,
    -(10**400),
    1j,
    "",
    "x" * 10**6,
    "\ud800",
    "\0",
    b"8",
    [[1]],
    [1, "a", None],
    endless(),
    {"steps": 1},
    {1, 2},
    object(),
    torch.ones(3),
    lambda: None,
]


@pytest.mark.parametrize("family", [LLADA, DREAM], ids=lambda family: family.name)
def test_no_value_of_any_parameter_causes_any_other_error(family):
    names = (*request_fields(family, 32), *REQUEST_FIELDS, "stepz", "\ud800", "x" * 10**6, 5)
    for name in names:
        for value in NASTY:
            with pytest.raises(BadRequest) as refused:
                parse_params(
                    family,
                    max_tokens=32,
                    temperature=0.0,
                    top_p=1.0,
                    top_k=0,
                    ignore_eos=False,
                    extra_args={name: value},
                    also_known=REQUEST_FIELDS,
                )
                choose_sparsity(SparseConfig(), {name: value}, 100)
                check_periods({name: value}, ("sparsed_refresh",), 32)
            assert len(str(refused.value)) < 2000
            assert str(refused.value).encode()


@pytest.mark.parametrize(
    ("family", "field"), [(LLADA, "alg"), (LLADA, "eps"), (DREAM, "remasking"), (LLADA, "stepz")]
)
def test_an_unknown_key_is_answered_with_the_known_ones(family, field):
    error = refusal(family, **{field: 1})
    assert error.field == field
    assert f"knows {'alg' if family is DREAM else 'block_length'}" in str(error)


def test_no_guidance_is_no_guidance():
    assert parse(cfg_scale=0) == parse()


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 5}])
def test_llada_does_not_truncate(sampling):
    assert refusal(LLADA, temperature=1.0, **sampling).field == next(iter(sampling))
    assert parse(DREAM, temperature=1.0, **sampling)


@pytest.mark.parametrize("temperature", [-1, 101, math.nan, math.inf])
def test_a_temperature_out_of_range_is_refused(temperature):
    assert refusal(temperature=temperature).field == "temperature"


def test_min_tokens_is_at_most_max_tokens():
    assert refusal(min_tokens=33).field == "min_tokens"
    assert parse(min_tokens=32, stop_tokens={5, 3}).stop_tokens == (3, 5)
    assert parse(stop_tokens={5, 3}).stop_tokens == ()


def test_an_entropy_threshold_takes_the_place_of_a_threshold():
    assert parse(entropy_threshold=0.5).threshold == -0.5
    assert parse(DREAM, entropy_threshold=0.5).policy == "entropy"
    assert parse(DREAM, entropy_threshold=0, alg="entropy").by_entropy
    assert refusal(entropy_threshold=0.5, threshold=0.9).field == "threshold"
    assert refusal(entropy_threshold=0.5, remasking="random").field == "remasking"
    assert refusal(DREAM, entropy_threshold=0.5, alg="maskgit_plus").field == "alg"
    assert refusal(DREAM, entropy_threshold=0.5, alg_temp=0.1).field == "alg_temp"
    assert refusal(entropy_threshold=0.5, variable_length=1).field == "variable_length"


@pytest.mark.parametrize("nats", [-0.1, 101, "0.5", math.nan, math.inf, True])
def test_an_entropy_threshold_outside_its_range_is_refused(nats):
    assert "a number in [0, 100]" in str(refusal(entropy_threshold=nats))


def test_a_canvas_of_variable_length_grows_by_blocks_of_illada_s_size_unless_it_says():
    assert parse(variable_length=1, max_tokens=100).block_length == 32
    assert parse(variable_length=1, max_tokens=8).block_length == 8
    assert parse(variable_length=1, block_length=16).block_length == 16
    assert parse(variable_length=0, max_tokens=100).block_length == 100
    assert refusal(variable_length=1, threshold=0.9).field == "variable_length"


def test_early_stop_contradicts_ignore_eos():
    assert refusal(early_stop=1, ignore_eos=True).field == "early_stop"
    assert parse(early_stop=0, ignore_eos=True).early_stop is False
