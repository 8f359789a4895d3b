# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Long and short requests that do not fit into one step: who waits for whom, and how long."""

import pytest
from engines import start_engine
from vllm import SamplingParams

pytestmark = pytest.mark.engine

BUDGET = 512  # tokens of a step
LONG, SHORT = [7] * 440, [1, 2, 3]


def sampling(max_tokens, **extra):
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args={"block_length": 4, **extra},
    )


def core_of(llm):
    return llm.llm_engine.engine_core.engine_core


def alone(llm, prompt, params):
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def add(llm, name, prompt, params, **rest):
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params, **rest)


def finish(llm, most=1000):
    """{name: (steps it took from now, tokens)} of the requests that end within `most` steps."""
    ended = {}
    for step in range(1, most + 1):
        if not llm.llm_engine.has_unfinished_requests():
            break
        for out in llm.llm_engine.step():
            if out.finished:
                ended[out.request_id.split("-")[0]] = step, list(out.outputs[0].token_ids)
    return ended


@pytest.fixture
def tight(llada, monkeypatch):
    """An engine whose steps hold one long request, and no page or row that is left behind."""
    scheduler = core_of(llada).scheduler
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", BUDGET)
    pool = scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    yield llada
    finish(llada)
    llada.llm_engine.step()
    assert not scheduler.requests
    assert not len(scheduler.waiting)
    assert not len(scheduler.progress)
    assert pool.get_num_free_blocks() == free
    state = core_of(llada).model_executor.driver_worker.worker.model_runner.model_state
    assert not state.requests


def test_short_requests_wait_a_step_at_most_beside_a_long_one(tight):
    long, short = sampling(64), sampling(8)
    expected = alone(tight, LONG, long), alone(tight, SHORT, short)
    add(tight, "long", LONG, long)
    finish(tight, most=5)
    for i in range(7):
        add(tight, f"short{i}", SHORT, short)
    ended = finish(tight)
    for i in range(7):
        steps, tokens = ended[f"short{i}"]
        assert steps <= 2 * 8
        assert tokens == expected[1]
    assert ended["long"] == (59 + 8, expected[0])


def test_a_long_request_that_waits_for_another_holds_up_no_short_one(tight):
    add(tight, "first", LONG, sampling(64))
    add(tight, "second", LONG, sampling(64))
    finish(tight, most=2)
    add(tight, "short", SHORT, sampling(8))
    ended = finish(tight)
    assert ended["short"][0] <= 2 * 8
    assert ended["first"][0] < ended["second"][0]
    assert ended["second"][1] == ended["first"][1]


def test_requests_that_pause_may_be_aborted_or_preempted(tight):
    expected = alone(tight, LONG, sampling(64))
    for name in ("long", "other"):
        add(tight, name, LONG, sampling(64))
    add(tight, "short", SHORT, sampling(40))
    finish(tight, most=6)
    assert core_of(tight).scheduler.reset_prefix_cache(reset_running_requests=True)
    finish(tight, most=7)
    tight.llm_engine.abort_request(["other"])
    ended = finish(tight)
    assert ended["long"][1] == expected
    assert ended.keys() == {"long", "short"}


def test_sparse_requests_that_take_turns_keep_their_tables(tight):
    sparse = sampling(16, use_sparsed=1, sparsed_block_size=16)
    sizes = (300, 300, 100)
    expected = [alone(tight, [5] * size, sparse) for size in sizes]
    for i, size in enumerate(sizes):
        add(tight, str(i), [5] * size, sparse)
    ended = finish(tight)
    assert [ended[str(i)][1] for i in range(3)] == expected


def test_the_more_important_request_goes_first_and_loses_no_step(llada_path):
    llm = start_engine(llada_path, scheduling_policy="priority")
    core_of(llm).scheduler.max_num_scheduled_tokens = BUDGET
    expected = alone(llm, LONG, sampling(64))
    add(llm, "usual", LONG, sampling(64), priority=3)
    add(llm, "idle", LONG, sampling(64), priority=9)
    finish(llm, most=10)
    add(llm, "urgent", LONG, sampling(64), priority=1)
    ended = finish(llm)
    assert {name: steps for name, (steps, _) in ended.items()} == {
        "urgent": 64,
        "usual": 64 + 54,
        "idle": 64 + 54 + 64,
    }
    assert all(tokens == expected for _, tokens in ended.values())


def test_requests_that_may_not_start_take_no_steps_from_those_that_run(tight, monkeypatch):
    monkeypatch.setattr(core_of(tight).scheduler, "max_num_active_reqs", 1)
    add(tight, "long", LONG, sampling(64))
    finish(tight, most=5)
    add(tight, "short", SHORT, sampling(8))
    ended = finish(tight)
    assert (ended["long"][0], ended["short"][0]) == (59, 59 + 8)


def test_an_urgent_request_waits_for_pages_and_takes_none(llada_path):
    """Each request holds its pages from its first step to its last, however unimportant it is."""
    llm = start_engine(llada_path, scheduling_policy="priority", num_gpu_blocks_override=6)
    pool = core_of(llm).scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    expected = alone(llm, LONG, sampling(64))
    add(llm, "usual", LONG, sampling(64), priority=9)
    finish(llm, most=10)
    assert pool.get_num_free_blocks() < free / 2
    add(llm, "urgent", LONG, sampling(64), priority=1)
    assert finish(llm) == {"usual": (64 - 10, expected), "urgent": (64 - 10 + 64, expected)}
    llm.llm_engine.step()
    assert pool.get_num_free_blocks() == free
