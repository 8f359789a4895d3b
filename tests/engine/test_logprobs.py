# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The engine's log probabilities, each of the step that filled its place, against the oracle's."""

import oracle
import pytest
from checkpoints import DREAM_MASK_ID, LLADA_MASK_ID
from sparse_oracle import Sparsity, sparse_llada_generate
from vllm import SamplingParams

pytestmark = pytest.mark.engine

CASES = [
    {"steps": 24},
    {"steps": 7, "block_length": 8},
    {"threshold": 0.05, "block_length": 8},
    {"steps": 12, "block_length": 5, "early_stop": 0},
    {"steps": 12, "use_sparsed": 1, "sparsed_block_size": 16},
]
PROMPTS = [[7 * i % 256 for i in range(length)] for length in (3, 60, 130)]


def sampling(logprobs, **extra):
    ignore_eos = not extra.get("stops")
    return SamplingParams(
        temperature=0,
        max_tokens=24,
        logprobs=logprobs,
        ignore_eos=ignore_eos,
        detokenize=False,
        stop_token_ids=extra.pop("stops", None),
        extra_args=extra,
    )


def generate(llm, prompts, params):
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [out.outputs[0] for out in llm.generate(requests, params, use_tqdm=False)]


def own(output):
    """[tokens] the log probability of each of an answer's tokens."""
    assert len(output.logprobs) == len(output.token_ids)
    found = [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)]
    assert output.cumulative_logprob == pytest.approx(sum(found), abs=1e-4)
    return found


def expected_of_llada(path, prompt, extra):
    """The authors' loop, or None where rounding could have tipped it."""
    asked = {"steps": 24, "block_length": 24, **extra}
    asked.pop("early_stop", None)
    asked |= {"gen_length": 24, "mask_id": LLADA_MASK_ID}
    network = oracle.load_llada(path)
    if asked.pop("use_sparsed", 0):
        sparsity = Sparsity(block_size=asked.pop("sparsed_block_size"))
        run = sparse_llada_generate(network, prompt, sparsity=sparsity, **asked)
    else:
        run = oracle.llada_generate(network, prompt, **asked)
    return None if run.met_a_tie() else run


def test_a_mixed_batch_gets_what_each_asked_for(llada, llada_path):
    prompts = [prompt for prompt in PROMPTS for _ in CASES]
    extras = CASES * len(PROMPTS)
    params = [sampling((None, 0, 2, 5)[i % 4], **extra) for i, extra in enumerate(extras)]
    compared = 0
    for prompt, extra, asked, output in zip(
        prompts, extras, params, generate(llada, prompts, params), strict=True
    ):
        if asked.logprobs is None:
            assert output.logprobs is None
            continue
        for at in output.logprobs:
            assert asked.logprobs <= len(at) <= asked.logprobs + 1
            assert LLADA_MASK_ID not in at
        if run := expected_of_llada(llada_path, prompt, extra):
            compared += 1
            assert list(output.token_ids) == run.ids
            assert own(output) == pytest.approx(run.logprobs, abs=1e-4)
    assert compared >= len(prompts) // 2


def test_dream_s_tokens_have_the_probabilities_of_its_shifted_rows(dream, dream_path):
    (output,) = generate(dream, PROMPTS[1:2], sampling(1, alg="entropy", steps=10))
    run = oracle.dream_generate(
        oracle.load_dream(dream_path),
        PROMPTS[1],
        steps=10,
        max_new_tokens=24,
        alg="entropy",
        mask_id=DREAM_MASK_ID,
    )
    assert not run.met_a_tie(), "choose another prompt"
    assert own(output) == pytest.approx(run.logprobs, abs=1e-4)


def test_an_answer_that_ends_early_has_the_same_probabilities(llada):
    (whole,) = generate(llada, PROMPTS[:1], sampling(2, block_length=8))
    stop = whole.token_ids[11]
    (cut,) = generate(llada, PROMPTS[:1], sampling(2, block_length=8, stops=[stop]))
    assert own(cut) == pytest.approx(own(whole)[: len(cut.token_ids)], abs=1e-5)


@pytest.mark.parametrize("extra", [{}, {"use_sparsed": 1, "sparsed_block_size": 16}], ids=str)
def test_preemption_changes_no_probability(llada, extra):
    params = sampling(3, block_length=4, steps=12, **extra)
    undisturbed = [own(output) for output in generate(llada, PROMPTS, params)]
    engine = llada.llm_engine
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    finished = [out for _ in range(5) for out in engine.step() if out.finished]
    scheduler = engine.engine_core.engine_core.scheduler
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    while engine.has_unfinished_requests():
        finished += [out for out in engine.step() if out.finished]
    got = {out.request_id.split("-")[0]: own(out.outputs[0]) for out in finished}
    assert [got[str(i)] for i in range(len(PROMPTS))] == [
        pytest.approx(one, abs=1e-5) for one in undisturbed
    ]
