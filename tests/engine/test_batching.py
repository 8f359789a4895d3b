# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Many requests at once: who shares a step, who waits, and that nobody notices the others."""

import functools
import random

import pytest
from engines import start_engine
from vllm import SamplingParams

from sparsed_vllm.steps import Phase

pytestmark = pytest.mark.engine


def mixed_requests(count, seed=0):
    """Requests of any mix: (prompt, sampling parameters)."""
    draw = random.Random(seed)
    styles = [
        {},
        {"steps": 3},
        {"block_length": 4, "steps": 9},
        {"threshold": 0.05},
        {"threshold": 0.9, "block_length": 5},
        {"remasking": "random"},
        {"early_stop": 0, "block_length": 3},
    ]
    requests = []
    for _ in range(count):
        prompt = [draw.randrange(256) for _ in range(draw.choice((1, 7, 30, 129, 200)))]
        params = SamplingParams(
            temperature=draw.choice((0.0, 0.8)),
            seed=draw.randrange(100),
            max_tokens=draw.choice((8, 16, 33)),
            ignore_eos=True,
            detokenize=False,
            extra_args=draw.choice(styles),
        )
        requests.append((prompt, params))
    return requests


def tokens(llm, requests):
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        [params for _, params in requests],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def worker_state_of(llm):
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.model_state


def add(llm, request_id, request):
    prompt, params = request
    llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, params)


def run_steps(llm, count):
    """[finished outputs] of `count` engine steps."""
    return [out for _ in range(count) for out in llm.llm_engine.step() if out.finished]


def assert_nothing_is_left(llm, free_pages):
    run_steps(llm, 2)  # an idle step tells the worker what has finished
    scheduler = scheduler_of(llm)
    assert not scheduler.requests
    assert not scheduler.running
    assert not len(scheduler.waiting)
    assert not len(scheduler.progress)
    assert not worker_state_of(llm).requests
    assert not worker_state_of(llm).logprobs
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free_pages


@pytest.fixture
def free_pages(llada):
    return scheduler_of(llada).kv_cache_manager.block_pool.get_num_free_blocks()


def test_a_batch_gives_each_request_the_tokens_it_gets_alone(llada):
    requests = mixed_requests(8)
    assert tokens(llada, requests) == [tokens(llada, [request])[0] for request in requests]


def test_more_requests_than_fit_wait_their_turn(llada, free_pages):
    requests = mixed_requests(20, seed=3)
    together = tokens(llada, requests)
    assert [len(ids) for ids in together] == [params.max_tokens for _, params in requests]
    assert together[-4:] == tokens(llada, requests[-4:])
    assert_nothing_is_left(llada, free_pages)


def test_a_request_takes_exactly_its_steps(llada):
    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, extra_args={"steps": 5}, detokenize=False
    )
    add(llada, "only", ([1, 2, 3], params))
    assert not run_steps(llada, 4)
    assert len(run_steps(llada, 1)) == 1


def test_a_new_request_joins_at_the_next_step_and_a_short_one_leaves(llada):
    long = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    short = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    add(llada, "long", ([1, 2, 3], long))
    assert not run_steps(llada, 3)
    add(llada, "short", ([4] * 100, short))
    finished = run_steps(llada, 2)
    assert [out.request_id.split("-")[0] for out in finished] == ["short"]
    assert len(run_steps(llada, 11)) == 1


def test_no_sequence_is_ever_split_and_the_budget_holds(llada, monkeypatch):
    scheduler = scheduler_of(llada)
    lengths, totals = [], []
    schedule = scheduler.schedule

    def spy(*args, **kwargs):
        output = schedule(*args, **kwargs)
        for request_id, length in output.num_scheduled_tokens.items():
            request = scheduler.requests[request_id]
            lengths.append((length, request.num_prompt_tokens + request.max_tokens))
        totals.append(output.total_num_scheduled_tokens)
        return output

    monkeypatch.setattr(scheduler, "schedule", spy)
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", 512)
    requests = mixed_requests(12, seed=5)
    tokens(llada, requests)
    assert lengths
    assert all(scheduled == whole for scheduled, whole in lengths)
    assert max(totals) <= 512


def test_a_sequence_may_be_as_long_as_the_model_allows(llada):
    params = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, extra_args={"steps": 3}
    )
    assert len(tokens(llada, [([7] * 500, params)])[0]) == 12


def test_aborts_leave_no_trace_and_harm_nobody(llada, free_pages):
    requests = mixed_requests(8, seed=7)
    alone = [tokens(llada, [request])[0] for request in requests]
    for i, request in enumerate(requests):
        add(llada, f"{i}", request)
    finished = run_steps(llada, 2)
    llada.llm_engine.abort_request(["1", "4", "6"])
    while llada.llm_engine.has_unfinished_requests():
        finished += run_steps(llada, 1)
    for out in finished:
        assert list(out.outputs[0].token_ids) == alone[int(out.request_id.split("-")[0])]
    assert {out.request_id.split("-")[0] for out in finished} >= {"0", "2", "3", "5", "7"}
    assert_nothing_is_left(llada, free_pages)


def request_of(length, temperature, extra):
    params = SamplingParams(
        temperature=temperature,
        seed=1,
        max_tokens=16,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
    )
    return [5] * length, params


PREEMPTED = [
    {"block_length": 4, "steps": 9},
    {"block_length": 4, "threshold": 0.01},
    {"block_length": 8, "steps": 10, "remasking": "random"},
]


@functools.cache
def undisturbed_requests(llm, extra):
    """(requests, their tokens), which every preemption is compared with."""
    sizes = ((1, 0.0), (40, 0.9), (200, 0.0), (7, 0.9))
    requests = [request_of(*one, dict(extra)) for one in sizes]
    return requests, tokens(llm, requests)


@pytest.mark.parametrize("extra", PREEMPTED, ids=str)
@pytest.mark.parametrize("after", [1, 3, 5])
def test_preempted_requests_give_the_same_tokens(llada, free_pages, after, extra):
    requests, undisturbed = undisturbed_requests(llada, tuple(extra.items()))
    for i, request in enumerate(requests):
        add(llada, f"{i}", request)
    finished = run_steps(llada, after)
    assert scheduler_of(llada).reset_prefix_cache(reset_running_requests=True)
    while llada.llm_engine.has_unfinished_requests():
        finished += run_steps(llada, 1)
    got = {out.request_id.split("-")[0]: list(out.outputs[0].token_ids) for out in finished}
    assert [got[str(i)] for i in range(4)] == undisturbed
    assert_nothing_is_left(llada, free_pages)


def phased_requests(count, seed):
    """Dense and sparse requests whose phases differ at every step."""
    draw = random.Random(seed)
    requests = []
    for _ in range(count):
        sparse = {"use_sparsed": 1, "sparsed_block_size": draw.choice((16, 32))}
        sparse["sparsed_skip"] = draw.choice((0, 0.2, 0.6))
        extra = {"steps": draw.choice((8, 12)), **draw.choice(({}, sparse, sparse))}
        params = SamplingParams(
            temperature=0, max_tokens=16, ignore_eos=True, detokenize=False, extra_args=extra
        )
        requests.append(([draw.randrange(256) for _ in range(draw.choice((1, 129, 350)))], params))
    return requests


def test_a_cache_full_to_the_last_page_empties_whatever_befalls_its_requests(llada, llada_path):
    requests = phased_requests(16, seed=14)
    alone = [tokens(llada, [request])[0] for request in requests]
    small = start_engine(llada_path, num_gpu_blocks_override=9)
    scheduler, pool = scheduler_of(small), scheduler_of(small).kv_cache_manager.block_pool
    free_pages = pool.get_num_free_blocks()
    for i, request in enumerate(requests):
        add(small, f"{i}", request)
    draw, finished, aborted, phases_when_full = random.Random(17), [], set(), []
    for step in range(1000):
        if not small.llm_engine.has_unfinished_requests():
            break
        finished += run_steps(small, 1)
        running = scheduler.running
        if pool.get_num_free_blocks() == 0:
            cursors = [scheduler.progress[request.request_id].cursor for request in running]
            phases_when_full.append({x.plan.phase_of(x.step) for x in cursors if x.steps_left})
        if step % 7 == 3 and running:
            aborted.add(draw.choice(running).request_id.split("-")[0])
            small.llm_engine.abort_request(list(aborted))
        if step % 11 == 5:
            assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert set(Phase) in phases_when_full
    got = {out.request_id.split("-")[0]: list(out.outputs[0].token_ids) for out in finished}
    assert aborted and got.keys() | aborted == {str(i) for i in range(len(requests))}
    assert all(ids == alone[int(i)] for i, ids in got.items() if i not in aborted)
    assert_nothing_is_left(small, free_pages)


def test_async_scheduling_changes_no_token(llada, async_llada):
    requests = mixed_requests(12, seed=11)
    assert tokens(async_llada, requests) == tokens(llada, requests)
    run_steps(async_llada, 2)
    assert not worker_state_of(async_llada).requests


def test_requests_that_take_turns_get_the_same_tokens(llada, async_llada, monkeypatch):
    requests = mixed_requests(12, seed=13)
    expected = tokens(llada, requests)
    for llm in (llada, async_llada):
        monkeypatch.setattr(scheduler_of(llm), "max_num_scheduled_tokens", 260)
        assert tokens(llm, requests) == expected


def test_async_scheduling_sends_no_step_beyond_the_last(async_llada, monkeypatch):
    scheduler = scheduler_of(async_llada)
    sent = []
    schedule = scheduler.schedule

    def spy(*args, **kwargs):
        output = schedule(*args, **kwargs)
        sent.append(output.total_num_scheduled_tokens)
        return output

    monkeypatch.setattr(scheduler, "schedule", spy)
    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, extra_args={"steps": 5}
    )
    counted = scheduler.tally.counts["denoising_steps"]
    tokens(async_llada, [([1, 2, 3], params)])
    assert [total for total in sent if total] == [11] * 5
    assert scheduler.tally.counts["denoising_steps"] - counted == 5


def test_samples_of_one_request_differ(llada):
    params = SamplingParams(n=3, temperature=1.0, max_tokens=16, ignore_eos=True)
    (output,) = llada.generate([{"prompt_token_ids": [1, 2]}], params, use_tqdm=False)
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 3


def test_temperature_zero_repeats_itself_without_a_seed(dream):
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    first, again = (
        dream.generate([{"prompt_token_ids": [1, 2]}], params, use_tqdm=False) for _ in range(2)
    )
    assert first[0].outputs[0].token_ids == again[0].outputs[0].token_ids
