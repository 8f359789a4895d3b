# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Checkpoints and vLLM's ways of loading them."""

import oracle
import pytest
from checkpoints import DREAM_MASK_ID, LLADA_MASK_ID, write_dream, write_llada
from engines import start_engine
from vllm import SamplingParams
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

pytestmark = pytest.mark.engine

PROMPTS = [[i * 5 % 256 for i in range(length)] for length in (1, 40, 130)]
STEPS = {"steps": 8}


def generate(path, extra=STEPS, **engine):
    llm = start_engine(path, max_model_len=256, **engine)
    params = SamplingParams(
        temperature=0, max_tokens=16, ignore_eos=True, detokenize=False, extra_args=extra
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("sizes", [{"tie": True}, {"shards": 3, "n_kv_heads": 1}], ids=str)
def test_llada_checkpoints_of_other_shapes_load(tmp_path, sizes):
    network = oracle.load_llada(write_llada(tmp_path, **sizes))
    expected = [
        oracle.llada_generate(
            network, prompt, gen_length=16, block_length=16, mask_id=LLADA_MASK_ID, **STEPS
        )
        for prompt in PROMPTS
    ]
    oracle.assert_same_tokens(generate(tmp_path), expected)


def test_a_dream_that_predicts_its_mask_fills_every_place_all_the_same(tmp_path):
    # Tied to a random embedding, this network often holds the mask for the likeliest token.
    network = oracle.load_dream(write_dream(tmp_path, tie=True, n_kv_heads=2))
    tokens = generate(tmp_path, {"alg": "entropy", **STEPS})
    expected = [
        oracle.dream_generate(
            network, prompt, max_new_tokens=16, alg="entropy", mask_id=DREAM_MASK_ID, **STEPS
        )
        for prompt in PROMPTS
    ]
    oracle.assert_same_tokens(tokens, expected)
    assert all(DREAM_MASK_ID not in ids for ids in tokens)


@pytest.mark.parametrize(
    "engine",
    [
        {"load_format": "dummy"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "quantization": "fp8_per_channel"},
    ],
    ids=str,
)
def test_vllm_s_own_flags_work(llada_path, engine):
    assert [len(ids) for ids in generate(llada_path, **engine)] == [16, 16, 16]


def test_a_compiled_network_gives_the_same_tokens(llada_path):
    assert generate(llada_path, enforce_eager=False) == generate(llada_path)


@pytest.mark.parametrize("write", [write_llada, write_dream])
def test_vllm_s_warm_up_passes_through(tmp_path, monkeypatch, write):
    # Grammar masks are for requests that are refused; their kernel does not run interpreted.
    monkeypatch.setattr(StructuredOutputsWorker, "apply_grammar_bitmask", lambda *_: None)
    llm = start_engine(write(tmp_path))
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    steps = (worker.model_runner, worker.execute_model, worker.sample_tokens)
    warmup_kernels(*steps)
    assert run_mixed_prefill_decode_warmup(*steps, 64)
    worker.model_runner.profile_run()
    assert not worker.model_runner.model_state.requests
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 8
