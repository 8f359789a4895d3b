# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A checkpoint's generation_config.json gives requests defaults that they may have."""

import json

import pytest
from checkpoints import write_dream, write_llada
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

import sparsed_vllm
from sparsed_vllm.admission import RequestReader, _check_served
from sparsed_vllm.models import defaults

QWEN_S = {"repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20}


@pytest.fixture(autouse=True, scope="module")
def registered(tmp_path_factory):
    sparsed_vllm.register()
    start(write_llada(tmp_path_factory.mktemp("first")))  # vLLM sets up its loggers


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(defaults.logger, "handlers", [*defaults.logger.handlers, caplog.handler])
    caplog.set_level("INFO", logger=defaults.logger.name)
    return caplog


def start(path, generation=None, **args):
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return EngineArgs(str(path), dtype="float32", **args).create_engine_config()


def read_plain_request(config):
    """What a request that sets nothing asks for. Raises BadRequest if it may not."""
    params = SamplingParams(**config.model_config.get_diff_sampling_param())
    _check_served(params)
    return RequestReader(config).plan(params, 10).params


@pytest.mark.parametrize(
    ("write", "expected"), [(write_llada, (0.7, 1.0, 0)), (write_dream, (0.7, 0.8, 20))]
)
def test_a_request_that_sets_nothing_is_served_whatever_the_file_says(
    tmp_path, log, write, expected
):
    params = read_plain_request(start(write(tmp_path), {**QWEN_S, "min_p": 0.1}))
    assert (params.temperature, params.top_p, params.top_k) == expected
    assert "generation_config.json asks for repetition_penalty: 1.05" in log.text
    assert ("top_p: 0.8" in log.text) == (write is write_llada)


def test_neutral_values_go_without_a_word(tmp_path, log):
    generation = {"repetition_penalty": 1.0, "top_p": 1.0, "top_k": 0}
    read_plain_request(start(write_llada(tmp_path), generation))
    assert "asks for" not in log.text


def test_the_authors_own_settings_are_named_as_no_defaults(tmp_path, log):
    start(write_dream(tmp_path), {"alg": "entropy", "steps": 512, "alg_temp": None})
    assert "has steps: 512, alg: 'entropy'" in log.text


def test_a_file_of_another_folder_is_named(tmp_path, log):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.3}))
    read_plain_request(start(write_llada(tmp_path), generation_config=str(folder)))
    assert f"--generation-config {folder} asks for repetition_penalty: 1.3" in log.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"repetition_penalty": 1.1}, "--override-generation-config sets repetition_penalty"),
        ({"top_p": 0.5}, "--override-generation-config sets top_p to 0.5, which a LLaDA"),
    ],
)
def test_an_operator_s_own_default_is_refused_by_name(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        start(write_llada(tmp_path), override_generation_config=overrides)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"temperature": 1000.0}, r"generation_config.json.* temperature must be a number in"),
        ({"temperature": "hot"}, "generation_config.json: temperature must be a number"),
        ({"eos_token_id": [257, "end"]}, "eos_token_id must be tokens, got 'end'"),
        ({"max_new_tokens": "many"}, "generation_config.json cannot be read: .* Correct or remove"),
        ({"max_new_tokens": 0}, "max_new_tokens.* must be .* 0"),
    ],
    ids=str,
)
def test_a_default_that_no_request_could_have_is_refused_at_the_start(
    tmp_path, generation, message
):
    with pytest.raises(ValueError, match=message):
        start(write_llada(tmp_path), generation)
