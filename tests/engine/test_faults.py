# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What goes wrong with one request is the end of that request only, by name."""

import re
from itertools import product

import pytest
import torch
from engines import start_engine
from vllm import SamplingParams

from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.layout import KEY_LEN, BatchLayout
from sparsed_vllm.sampler import DenoisingSampler
from sparsed_vllm.scheduler import NOT_NUMBERS

pytestmark = pytest.mark.engine

PROMPTS = [[1, 2, 3], [5] * 40, [7] * 90]
VICTIM = 1


def generate(llm, logprobs=None, **extra):
    params = SamplingParams(
        temperature=0,
        max_tokens=16,
        ignore_eos=True,
        detokenize=False,
        logprobs=logprobs,
        extra_args={"block_length": 8, **extra},
    )
    requests = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [out.outputs[0] for out in llm.generate(requests, params, use_tqdm=False)]


def core_of(llm):
    return llm.llm_engine.engine_core.engine_core


def poison(monkeypatch, value, step):
    """Spoil what one place's logits come from, of the second request in its step `step`."""
    sample = DenoisingSampler.__call__

    def spoiled(self, hidden_states, input_batch):
        batch = self.state.batch_of(input_batch)
        for i, first, _ in batch.rows_of_requests():
            request = batch.requests[i]
            is_victim = request.plan.prompt_len == len(PROMPTS[VICTIM])
            if is_victim and request.cursor.step == step + 1:  # it was advanced
                hidden_states[first, 3] = value
        return sample(self, hidden_states, input_batch)

    monkeypatch.setattr(DenoisingSampler, "__call__", spoiled)


def assert_only_the_victim_failed(llm, outputs, alone, num_tokens=0):
    assert [out.finish_reason for out in outputs] == ["length", "error", "length"]
    assert outputs[VICTIM].stop_reason == NOT_NUMBERS
    assert list(outputs[VICTIM].token_ids) == list(alone[VICTIM].token_ids[:num_tokens])
    for i in (0, 2):
        assert outputs[i].token_ids == alone[i].token_ids
    scheduler = core_of(llm).scheduler
    assert not scheduler.requests
    assert not len(scheduler.progress)
    assert [out.token_ids for out in generate(llm)] == [out.token_ids for out in alone]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("step", [0, 7, 10])
def test_logits_that_are_not_numbers_fail_their_request(llada, monkeypatch, caplog, value, step):
    alone = generate(llada)
    with monkeypatch.context() as patch:
        poison(patch, value, step)
        outputs = generate(llada, logprobs=1 if step else None)
    assert_only_the_victim_failed(llada, outputs, alone, num_tokens=8 if step > 7 else 0)
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(rf"Request \S+ failed: {NOT_NUMBERS}\.", line)


SPARSE = {"use_sparsed": 1, "sparsed_block_size": 16}
KERNELS = ["block_scores", "select_blocks", "block_sparse_attention"]


FAILURES = [RuntimeError("out of registers"), torch.OutOfMemoryError("of the GPU"), MemoryError()]


def name_of(value):
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize(
    ("kernel", "failure"),
    [*product(KERNELS, FAILURES[:1]), *product(KERNELS[-1:], FAILURES[1:])],
    ids=name_of,
)
def test_a_kernel_s_failure_fails_the_request_it_worked_for(llada, monkeypatch, kernel, failure):
    alone = generate(llada, **SPARSE)
    run = getattr(api, kernel)

    def failing(*args, **kwargs):
        layout = next(x for x in args if isinstance(x, BatchLayout))
        if len(PROMPTS[VICTIM]) + 16 in layout.host[KEY_LEN]:
            raise failure
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(api, kernel, failing)
        outputs = generate(llada, **SPARSE)
    assert [out.finish_reason for out in outputs] == ["length", "error", "length"]
    for i in (0, 2):
        assert outputs[i].token_ids == alone[i].token_ids
    assert [out.token_ids for out in generate(llada, **SPARSE)] == [out.token_ids for out in alone]


def test_memory_that_lacks_for_a_batch_but_not_for_its_requests_fails_none(llada, monkeypatch):
    alone = generate(llada, **SPARSE)
    run = api.block_sparse_attention
    refused = []

    def failing(*args, **kwargs):
        layout = next(x for x in args if isinstance(x, BatchLayout))
        if layout.num_seqs > 1:
            refused.append(layout)
            raise torch.OutOfMemoryError
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(api, "block_sparse_attention", failing)
        outputs = generate(llada, **SPARSE)
    assert refused
    assert [out.token_ids for out in outputs] == [out.token_ids for out in alone]


@pytest.mark.parametrize("kernel", [*KERNELS, "dense_attention", "choose_tokens"])
def test_an_engine_whose_kernel_cannot_run_does_not_start(llada_path, monkeypatch, kernel):
    def failing(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(api, kernel, failing)
    with pytest.raises(RuntimeError, match="no kernel image"):
        start_engine(llada_path)


@pytest.mark.parametrize(
    ("kernel", "failure"),
    [
        ("block_scores", AssertionError("the table is too narrow")),
        ("dense_attention", torch.OutOfMemoryError("of the GPU")),
    ],
    ids=name_of,
)
def test_what_fails_a_whole_step_ends_the_engine(llada_path, monkeypatch, kernel, failure):
    """A failed assertion of our own is a bug, and is not taken for bad logits."""
    llm = start_engine(llada_path)

    def failing(*args, **kwargs):
        raise failure

    monkeypatch.setattr(api, kernel, failing)
    with pytest.raises(type(failure), match=str(failure)):
        generate(llm, use_sparsed=1)
