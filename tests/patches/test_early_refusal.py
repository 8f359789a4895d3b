# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A bad request is refused when its generator is asked for, not when it is first read."""

from types import SimpleNamespace

import pytest

from sparsed_vllm.patches import early_refusal, early_response

PROMPT = {"type": "token", "prompt_token_ids": [1]}


def engine_of(architecture, refuse, early_errors=1):
    """An engine, as far as the patches read it."""
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(architecture=architecture),
            additional_config={"denoising": {"early_errors": early_errors}},
        ),
        input_processor=SimpleNamespace(process_inputs=refuse),
    )


def generate(architecture, prompt, refuse, **settings):
    engine = engine_of(architecture, refuse, **settings)
    given = early_refusal.PATCH.wrap(lambda *args, **kwargs: (args, kwargs))
    return given(engine, prompt, "params", "id", priority=1)[1]


def respond(prompt, refuse):
    given = early_response.PATCH.wrap(lambda *args, **kwargs: (args[1:], kwargs))
    endpoint = SimpleNamespace(engine_client=engine_of("LLaDAModelLM", refuse))
    asked = {"request_id": "id", "engine_input": prompt, "sampling_params": "params"}
    return given(endpoint, **asked, priority=1)


def refuse(*args, **kwargs):
    raise ValueError("bad request")


def test_an_engine_with_early_errors_checks_at_once():
    with pytest.raises(ValueError, match="bad request"):
        generate("LLaDAModelLM", PROMPT, refuse)
    assert generate("LLaDAModelLM", PROMPT, lambda *_, **__: None) == {"priority": 1}


def test_other_engines_and_prompts_that_are_not_tokenized_yet_wait():
    assert generate("LLaDAModelLM", PROMPT, refuse, early_errors=0) == {"priority": 1}
    assert generate("LlamaForCausalLM", PROMPT, refuse) == {"priority": 1}
    assert generate("LLaDAModelLM", "hello", refuse) == {"priority": 1}


def test_responses_are_checked_before_their_stream():
    with pytest.raises(ValueError, match="bad request"):
        respond(PROMPT, refuse)
    expected = (("id", PROMPT, "params"), {"priority": 1})
    assert respond(PROMPT, lambda *_, **__: None) == expected
