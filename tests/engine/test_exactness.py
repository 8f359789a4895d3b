# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The engine's tokens against the authors' loops, at temperature 0 in float32."""

import random

import oracle
import pytest
from checkpoints import DREAM_MASK_ID, LLADA_MASK_ID
from vllm import SamplingParams

pytestmark = pytest.mark.engine

LENGTHS = (1, 2, 17, 63, 128, 301)
LLADA_CASES = [
    {"max_tokens": 32, "steps": 32, "block_length": 32},
    {"max_tokens": 32, "steps": 16, "block_length": 8},
    {"max_tokens": 32, "steps": 8, "block_length": 32},
    {"max_tokens": 24, "steps": 5, "block_length": 24},
    {"max_tokens": 50, "steps": 33, "block_length": 16},
    {"max_tokens": 30, "steps": 5, "block_length": 7},
    {"max_tokens": 9, "steps": 1, "block_length": 9},
    {"max_tokens": 6, "steps": 24, "block_length": 3},
    {"max_tokens": 1, "steps": 1, "block_length": 1},
    {"max_tokens": 32, "steps": 32, "block_length": 8, "threshold": 0.9},
    {"max_tokens": 40, "steps": 40, "block_length": 16, "threshold": 0.05},
    {"max_tokens": 32, "steps": 32, "block_length": 32, "threshold": 0.02},
]
DREAM_CASES = [
    {"max_tokens": num_tokens, "steps": steps, "alg": alg}
    for alg in ("maskgit_plus", "topk_margin", "entropy")
    for num_tokens, steps in ((32, 16), (32, 32), (24, 7), (20, 40), (1, 1))
] + [
    {"max_tokens": 32, "steps": 16, "alg": "entropy", "block_length": 8},
    {"max_tokens": 30, "steps": 13, "alg": "maskgit_plus", "block_length": 7, "eps": 0.01},
    {"max_tokens": 32, "threshold": 0.05},
    {"max_tokens": 32, "threshold": 0.3, "block_length": 8},
]


def prompts(seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(length)] for length in LENGTHS]


def generate(llm, batch, max_tokens, **extra):
    """[len(batch)] the token ids of each request."""
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=extra
    )
    requests = [{"prompt_token_ids": prompt} for prompt in batch]
    outputs = llm.generate(requests, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("case", LLADA_CASES, ids=str)
def test_llada_generates_what_its_authors_loop_does(llada, llada_path, case):
    network = oracle.load_llada(llada_path)
    batch = prompts()
    kwargs = {key: value for key, value in case.items() if key != "max_tokens"}
    expected = [
        oracle.llada_generate(
            network, prompt, gen_length=case["max_tokens"], mask_id=LLADA_MASK_ID, **kwargs
        )
        for prompt in batch
    ]
    oracle.assert_same_tokens(generate(llada, batch, **case), expected)


@pytest.mark.parametrize("case", DREAM_CASES, ids=str)
def test_dream_generates_what_its_authors_loop_does(dream, dream_path, case):
    network = oracle.load_dream(dream_path)
    batch = prompts(seed=1)
    kwargs = {"steps": case["max_tokens"], "alg": "maskgit_plus", **case}
    num_tokens = kwargs.pop("max_tokens")
    expected = [
        oracle.dream_generate(
            network, prompt, max_new_tokens=num_tokens, mask_id=DREAM_MASK_ID, **kwargs
        )
        for prompt in batch
    ]
    oracle.assert_same_tokens(generate(dream, batch, **case), expected)
