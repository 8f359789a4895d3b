# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Requests that cannot be served: told so by name, and nobody else notices."""

import oracle
import pytest
from checkpoints import DREAM_MASK_ID, LLADA_EOS_ID, LLADA_MASK_ID
from engines import start_engine
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

pytestmark = pytest.mark.engine

PROMPT = {"prompt_token_ids": [1, 2, 3]}


def ask(llm, prompt=PROMPT, **sampling):
    params = SamplingParams(**{"temperature": 0, "max_tokens": 8, **sampling})
    return llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids


def refusal(llm, prompt=PROMPT, **sampling):
    """What a refused request is told; the engine must go on serving."""
    with pytest.raises((ValueError, VLLMValidationError)) as refused:
        ask(llm, prompt, **sampling)
    assert len(ask(llm, ignore_eos=True)) == 8
    return str(refused.value)


@pytest.mark.parametrize(
    "sampling",
    [
        {"logit_bias": {1: 2.0}},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"min_p": 0.1, "temperature": 1.0},
        {"prompt_logprobs": 1},
        {"logprob_token_ids": [1]},
        {"bad_words": ["a"]},
        {"allowed_token_ids": [1, 2]},
        {"structured_outputs": StructuredOutputsParams(choice=["a", "b"])},
    ],
    ids=lambda sampling: next(iter(sampling)),
)
def test_what_denoising_does_not_use_is_refused_by_name(llada, sampling):
    field = next(iter(sampling))
    message = refusal(llada, **sampling)
    assert message.startswith(f"{field} must be absent or")
    assert "leave" in message.lower()


def test_a_grammar_is_refused_in_the_client_s_words_and_not_repeated(llada):
    # tool_choice "required", or of one function, arrives as the schema of all tools.
    schema = StructuredOutputsParams(json={"properties": {f"tool{i}": {} for i in range(100)}})
    message = refusal(llada, structured_outputs=schema)
    assert 'use tool_choice "auto" or "none"' in message
    assert "tool99" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "sampling", [{"logit_bias": {}}, {"bad_words": []}, {"stop": []}, {"extra_args": {}}], ids=str
)
def test_an_empty_value_asks_for_nothing(llada, sampling):
    assert ask(llada, ignore_eos=True, **sampling) == ask(llada, ignore_eos=True)


@pytest.mark.parametrize(
    "extra",
    [
        {"steps": 0},
        {"steps": 10**9},
        {"block_length": 9},
        {"threshold": 2},
        {"alg": "entropy"},
        {"remasking": "no"},
        {"cfg_scale": 1},
        {"stepz": 4},
    ],
    ids=str,
)
def test_bad_denoising_parameters_are_refused_by_name(llada, extra):
    field, value = next(iter(extra.items()))
    message = refusal(llada, extra_args=extra)
    assert message.startswith(f"{field} must be")
    assert f"got {value!r}" in message


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 3}])
def test_llada_refuses_truncation_and_dream_does_it(llada, dream, sampling):
    assert "for a LLaDA model" in refusal(llada, temperature=1.0, **sampling)
    assert ask(dream, temperature=1.0, **sampling)


def test_prompt_and_canvas_must_fit_the_model(llada):
    long = {"prompt_token_ids": [1] * 510}
    assert "at most 2 (max_model_len 512 less 510 of prompt)" in refusal(llada, long)


def test_a_canvas_is_128_places_long_unless_somebody_says_otherwise(llada):
    assert llada.get_default_sampling_params().max_tokens == 128
    assert len(ask(llada, max_tokens=None, ignore_eos=True)) == 128
    nearly_full = {"prompt_token_ids": [1] * 500}
    assert len(ask(llada, nearly_full, max_tokens=None, ignore_eos=True)) == 12
    assert "min_tokens" in refusal(llada, max_tokens=None, min_tokens=129)
    refusal(llada, {"prompt_token_ids": [1] * 512}, max_tokens=None)


def test_an_operator_limits_what_clients_may_ask(llada_path):
    limits = {"max_tokens": 40, "max_steps": 24, "request_fields": ["steps"]}
    llm = start_engine(llada_path, additional_config={"denoising": limits})
    assert "at most 40 on this server" in refusal(llm, max_tokens=41)
    assert "[1, 24] (this server's limit)" in refusal(llm, max_tokens=40, extra_args={"steps": 25})
    assert "lets clients set steps" in refusal(llm, extra_args={"use_sparsed": 0})
    assert llm.get_default_sampling_params().max_tokens == 40
    assert len(ask(llm, max_tokens=40, ignore_eos=True)) == 40
    with pytest.raises(ValueError, match=r"denoising\.max_step must be absent"):
        start_engine(llada_path, additional_config={"denoising": {"max_step": 1}})


def test_an_absurd_length_is_refused_before_it_costs_anything(llada):
    message = refusal(llada, max_tokens=10**12, extra_args={"use_sparsed": 1})
    assert message.startswith("max_tokens must be at most 509")


@pytest.mark.parametrize(
    "sampling",
    [
        {"max_tokens": 2.5},
        {"min_tokens": 1.5},
        {"logprobs": 1.5},
        {"seed": 0.5},
        {"seed": "one"},
        {"seed": 2**64},
        {"stream_interval": 2**70},
        {"stop": ["\ud800"]},
        {"extra_args": ["steps"]},
        {"extra_args": {"steps": float("nan")}},
        {"extra_args": {"steps": 2**64 - 1}},
        {"extra_args": {"steps": [[4]]}},
        {"extra_args": {"steps": "\ud800"}},
        {"extra_args": {"\ud800": 1}},
        {"extra_args": {5: 1}},
    ],
    ids=ascii,
)
def test_values_of_the_wrong_type_are_refused(llada, sampling):
    message = refusal(llada, **sampling)
    assert " must be " in message
    assert message.encode()


def test_a_prompt_must_not_be_empty(llada):
    assert "cannot be empty" in refusal(llada, {"prompt_token_ids": []})


@pytest.mark.parametrize("token", [-1, 320, 10**6])
def test_prompt_tokens_must_be_in_the_vocabulary(llada, token):
    assert str(token) in refusal(llada, {"prompt_token_ids": [1, token]})


def test_a_mask_in_the_prompt_is_refused(llada, dream):
    with pytest.raises(ValueError):
        ask(llada, {"prompt_token_ids": [LLADA_MASK_ID]})
    assert "mask token" in refusal(llada, {"prompt_token_ids": [1, LLADA_MASK_ID]})
    assert "mask token" in refusal(dream, {"prompt_token_ids": [DREAM_MASK_ID]})


def test_more_than_the_likeliest_alternatives_are_refused(llada):
    assert "logprobs" in refusal(llada, logprobs=-1)


def test_beam_search_is_refused(llada):
    with pytest.raises(ValueError, match="beam search must be absent"):
        llada.beam_search([PROMPT], BeamSearchParams(beam_width=2, max_tokens=4))


def test_a_bad_request_leaves_its_batch_mates_alone(llada):
    good = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    alone = ask(llada, ignore_eos=True)
    engine = llada.llm_engine
    engine.add_request("1", PROMPT, good)
    engine.step()
    with pytest.raises(ValueError, match="steps"):
        engine.add_request("2", PROMPT, SamplingParams(extra_args={"steps": -1}))
    finished = []
    while engine.has_unfinished_requests():
        finished += [out for out in engine.step() if out.finished]
    assert [out.outputs[0].token_ids for out in finished] == [alone]


def test_the_caller_s_parameters_are_not_changed(llada):
    params = SamplingParams(temperature=0.5, max_tokens=4)
    llada.generate([PROMPT], params, use_tqdm=False)
    assert params.seed is None


def test_text_ends_at_eos_and_at_stop_tokens(llada):
    whole = ask(llada, ignore_eos=True, max_tokens=24, extra_args={"block_length": 8})
    stop = whole[11]
    cut = ask(llada, max_tokens=24, stop_token_ids=[stop], extra_args={"block_length": 8})
    assert list(cut) == list(whole[: list(whole).index(stop) + 1])


@pytest.mark.parametrize("extra", [{"block_length": 8, "steps": 12}, {"threshold": 0.05}], ids=str)
def test_no_stop_token_stands_at_the_first_min_tokens_places(llada, llada_path, extra):
    whole = ask(llada, ignore_eos=True, max_tokens=24, extra_args=extra)
    stops = sorted({whole[0], whole[3], whole[12]})
    asked = {"max_tokens": 24, "stop_token_ids": stops, "extra_args": extra}
    assert len(ask(llada, **asked)) == 1
    got = list(ask(llada, min_tokens=10, **asked))
    assert not {*got[:10]} & {*stops, LLADA_EOS_ID}
    expected = oracle.llada_generate(
        oracle.load_llada(llada_path),
        PROMPT["prompt_token_ids"],
        **{"steps": 24, "block_length": 24, **extra},
        gen_length=24,
        mask_id=LLADA_MASK_ID,
        min_tokens=10,
        stop_ids=[*stops, LLADA_EOS_ID],
    )
    assert not expected.met_a_tie(), "choose another prompt"
    assert got == expected.ids[: len(got)]
    assert len(got) == 24 or got[-1] in {*stops, LLADA_EOS_ID}


def test_min_tokens_holds_for_drawn_tokens(dream):
    stops = list(range(1, 256, 2))
    for seed in range(4):
        sampling = {"temperature": 1.0, "seed": seed, "stop_token_ids": stops, "min_tokens": 20}
        tokens = ask(dream, max_tokens=24, **sampling)
        assert not {*tokens[:20]} & {*stops}
        assert len(tokens) >= 20


def test_min_tokens_needs_a_token_that_does_not_stop(llada):
    message = refusal(llada, min_tokens=1, stop_token_ids=list(range(320)))
    assert message.startswith("stop_token_ids must be less than")


def test_blocks_that_are_drawn_early_end_with_their_steps(dream):
    for block_length in (8, 12):
        extra = {"alg": "origin", "block_length": block_length}
        assert len(ask(dream, max_tokens=24, ignore_eos=True, extra_args=extra)) == 24


def test_chat_renders_the_checkpoint_s_template(llada, dream):
    for llm in (llada, dream):
        (output,) = llm.chat(
            [{"role": "user", "content": "hi"}],
            SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
            use_tqdm=False,
        )
        assert len(output.outputs[0].token_ids) == 8


def test_temperature_is_zero_unless_the_request_says_otherwise(llada, dream):
    for llm in (llada, dream):
        assert llm.get_default_sampling_params().temperature == 0
