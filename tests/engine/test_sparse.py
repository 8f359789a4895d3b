# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""SparseD inside the engine: its tokens against the oracle's, in any batch."""

import math
import random

import oracle
import pytest
import torch
from checkpoints import DREAM_MASK_ID, LLADA_MASK_ID
from engines import masks_of, scheduler_of, start_engine, state_of
from sparse_oracle import Sparsity, sparse_dream_generate, sparse_llada_generate
from vllm import SamplingParams

from sparsed_vllm.kernels import api

pytestmark = pytest.mark.engine

LENGTHS = (1, 17, 100, 301)
BOUNDED = {"sparsed_mass": 0.5, "sparsed_select": 0.5}
AGAIN = {"sparsed_mass": 0.5, "sparsed_refresh": 5}
LLADA_CASES = [
    {"max_tokens": 32, "steps": 16, "sparsed_block_size": 32},
    {"max_tokens": 32, "steps": 16, "block_length": 8, "sparsed_block_size": 16},
    {"max_tokens": 33, "steps": 11, "sparsed_block_size": 16, "sparsed_select": 0.1},
    {"max_tokens": 24, "steps": 24, "sparsed_block_size": 64, "sparsed_skip": 0.5},
    {"max_tokens": 32, "steps": 8, "sparsed_block_size": 128, "sparsed_skip": 0},
    {"max_tokens": 32, "steps": 32, "threshold": 0.05, "sparsed_block_size": 16},
    {"max_tokens": 32, "steps": 12, "sparsed_block_size": 16, "sparsed_mass": 0.6},
    {"max_tokens": 32, "steps": 8, "block_length": 8, **BOUNDED, "sparsed_block_size": 32},
    {"max_tokens": 32, "steps": 16, "sparsed_block_size": 16, "sparsed_refresh": 4},
    {"max_tokens": 32, "steps": 16, "sparsed_block_size": 16, "sparsed_query_block_size": 128},
    {"max_tokens": 32, "threshold": 0.05, "sparsed_block_size": 16, "sparsed_refresh": 3},
]
DREAM_CASES = [
    {"max_tokens": 32, "steps": 16, "alg": alg, "sparsed_block_size": 16}
    for alg in ("maskgit_plus", "topk_margin", "entropy")
] + [{"max_tokens": 32, "steps": 12, "alg": "entropy", "sparsed_block_size": 16, **AGAIN}]


def prompts():
    draw = random.Random(2)
    return [[draw.randrange(256) for _ in range(length)] for length in LENGTHS]


def sampling(extra, max_tokens=32):
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=extra
    )


def generate(llm, batch, extras, max_tokens=32):
    """[len(batch)] the token ids of each request; extras: its parameters, one for all or each."""
    extras = [extras] * len(batch) if isinstance(extras, dict) else extras
    params = [sampling(extra, max_tokens) for extra in extras]
    requests = [{"prompt_token_ids": prompt} for prompt in batch]
    outputs = llm.generate(requests, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def split(case):
    """A case as (max_tokens, denoising parameters, the oracle's Sparsity)."""
    sparse = {
        name.removeprefix("sparsed_"): value
        for name, value in case.items()
        if name.startswith("sparsed_")
    }
    rest = {name: value for name, value in case.items() if not name.startswith("sparsed_")}
    return rest.pop("max_tokens"), rest, Sparsity(**sparse)


def recorded_by(llm):
    """The running requests that have recorded their table."""
    known, running = state_of(llm).requests, scheduler_of(llm).requests
    plans = {name: (x.plan, x.cursor) for name, x in known.items() if name in running}
    return {
        name
        for name, (plan, cursor) in plans.items()
        if plan.recording_step is not None and cursor.step > plan.recording_step
    }


def free_pages_of(llm):
    return scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()


ORACLES = {
    "llada": (oracle.load_llada, sparse_llada_generate, "gen_length", LLADA_MASK_ID),
    "dream": (oracle.load_dream, sparse_dream_generate, "max_new_tokens", DREAM_MASK_ID),
}


def expected(family, path, case):
    """The oracle's runs of all prompts."""
    load, generate, length_name, mask_id = ORACLES[family]
    num_tokens, rest, sparsity = split(case)
    rest = {"steps": num_tokens, **rest}
    if family == "llada":
        rest = {"block_length": num_tokens, **rest}
    network, given = load(path), {length_name: num_tokens, "mask_id": mask_id, **rest}
    return [generate(network, prompt, sparsity=sparsity, **given) for prompt in prompts()]


CASES = [("llada", case) for case in LLADA_CASES] + [("dream", case) for case in DREAM_CASES]


@pytest.mark.parametrize(("family", "case"), CASES, ids=str)
def test_requests_follow_their_pattern_as_published(request, family, case):
    llm, path = (request.getfixturevalue(name) for name in (family, f"{family}_path"))
    extras = {key: value for key, value in case.items() if key != "max_tokens"}
    actual = generate(llm, prompts(), {**extras, "use_sparsed": 1}, case["max_tokens"])
    oracle.assert_same_tokens(actual, expected(family, path, case))


@pytest.mark.parametrize("own", [{"sparsed_select": 1}, {"sparsed_refresh": 1}], ids=str)
def test_keeping_every_block_and_recording_at_every_step_are_dense(llada, own):
    dense = generate(llada, prompts(), {"steps": 16})
    whole = {"steps": 16, "use_sparsed": 1, "sparsed_block_size": 16, **own}
    assert generate(llada, prompts(), whole) == dense


@pytest.mark.parametrize(("extra", "is_sparse"), [({}, False), ({"use_sparsed": 1}, True)])
def test_short_requests_stay_dense_unless_they_ask(llada, extra, is_sparse):
    llada.llm_engine.add_request("1", {"prompt_token_ids": [1] * 50}, sampling(extra, 8))
    recorded = set()
    while llada.llm_engine.has_unfinished_requests():
        llada.llm_engine.step()
        recorded |= recorded_by(llada)
    assert bool(recorded) == is_sparse


def mixed_requests():
    """Requests whose phases differ at every step: (prompts, parameters)."""
    draw = random.Random(4)
    batch, extras = [], []
    for _ in range(8):
        batch.append([draw.randrange(256) for _ in range(draw.choice((1, 30, 129, 250)))])
        sparse = {"use_sparsed": 1, "sparsed_block_size": draw.choice((16, 32, 64))}
        sparse["sparsed_skip"] = draw.choice((0, 0.2, 0.6))
        sparse["sparsed_select"] = draw.choice((0.1, 0.3, 0.5))
        sparse |= draw.choice(({}, {"sparsed_mass": 0.4}, {"sparsed_refresh": 3}))
        extras.append({"steps": draw.choice((8, 16)), **draw.choice(({}, sparse, sparse))})
    return batch, extras


def test_batch_mates_in_other_phases_change_no_token(llada):
    batch, extras = mixed_requests()
    together = generate(llada, batch, extras)
    alone = [generate(llada, [one], [x])[0] for one, x in zip(batch, extras, strict=True)]
    assert together == alone


PREEMPTED = {"steps": 16, "block_length": 8, "use_sparsed": 1, "sparsed_block_size": 32}
TO_PREEMPT = [
    (prompt, extra)
    for prompt in prompts()
    for extra in (PREEMPTED, {**PREEMPTED, "sparsed_mass": 0.5, "sparsed_refresh": 3})
]


@pytest.fixture(scope="module")
def undisturbed(llada):
    """The tokens of requests that are not preempted."""
    return generate(llada, *zip(*TO_PREEMPT, strict=True))


@pytest.mark.parametrize("after", [1, 4, 7, 12])
def test_a_preempted_sparse_request_ends_as_if_undisturbed(llada, undisturbed, after):
    engine = llada.llm_engine
    for i, (prompt, extra) in enumerate(TO_PREEMPT):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling(extra))
    finished = [out for _ in range(after) for out in engine.step() if out.finished]
    assert scheduler_of(llada).reset_prefix_cache(reset_running_requests=True)
    while engine.has_unfinished_requests():
        finished += [out for out in engine.step() if out.finished]
    got = {out.request_id: list(out.outputs[0].token_ids) for out in finished}
    assert [got[str(i)] for i in range(len(undisturbed))] == undisturbed


def test_a_table_goes_with_its_request(llada):
    engine, before = llada.llm_engine, free_pages_of(llada)
    extra = {"use_sparsed": 1, "sparsed_skip": 0}
    for i in range(4):
        engine.add_request(str(i), {"prompt_token_ids": [i] * 20}, sampling(extra, 16))
    for _ in range(3):
        engine.step()
    assert len(recorded_by(llada)) == 4
    assert free_pages_of(llada) == before - 4
    engine.abort_request(["0", "2"])
    engine.step()
    assert len(recorded_by(llada)) == 2
    assert free_pages_of(llada) == before - 2
    while engine.has_unfinished_requests():
        engine.step()
    engine.step()
    assert not recorded_by(llada)
    assert free_pages_of(llada) == before


def test_pages_hold_the_tables_of_a_full_step_and_nothing_else(llada):
    state, scheduler = state_of(llada), scheduler_of(llada)
    layers = state.vllm_config.compilation_config.static_forward_context.values()
    heads, ids = 4, state.reader.sparse_config.table_ids
    assert [x.kv_cache[0].nbytes for x in layers] == [heads * ids * 2 * 128] * 2
    extra = {"use_sparsed": 1, "sparsed_skip": 0, "sparsed_select": 1, "sparsed_block_size": 16}
    count = state.max_num_tokens // 512
    prompt = [i % 256 for i in range(496)]
    alone = generate(llada, [prompt], extra, 16)
    assert generate(llada, [prompt] * count, extra, 16) == alone * count
    assert not scheduler.running


@pytest.mark.parametrize(("level", "steps_left"), [(0, 4), (1, 10), (2, 10)])
def test_a_request_kept_through_sleep_starts_over_if_its_pages_are_gone(llada, level, steps_left):
    # Without sleep mode memory stays where it is; what scheduler and workers are told is the same.
    alone = fall_asleep_after(6, llada, level, mode="keep")
    assert not llada.llm_engine.step()
    before = free_pages_of(llada)
    llada.wake_up()
    (output,) = [out for _ in range(steps_left) for out in llada.llm_engine.step()]
    assert output.finished
    assert list(output.outputs[0].token_ids) == alone
    llada.llm_engine.step()
    assert not recorded_by(llada)
    assert free_pages_of(llada) - before == (2 if level == 0 else 0)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_no_table_of_an_aborted_request_outlives_sleep(llada, level):
    fall_asleep_after(6, llada, level, mode="abort")
    llada.wake_up()
    llada.llm_engine.step()
    assert not recorded_by(llada)
    assert not scheduler_of(llada).requests
    llada.llm_engine.abort_request(["0"])  # the front end was not told


def fall_asleep_after(count, llm, level, mode):
    """Send a sparse request to sleep after some of its 10 steps; its tokens when undisturbed."""
    prompt = [5] * 100
    extra = {"use_sparsed": 1, "steps": 10, "sparsed_block_size": 16}
    (alone,) = generate(llm, [prompt], extra)
    llm.llm_engine.add_request("0", {"prompt_token_ids": prompt}, sampling(extra))
    for _ in range(count):
        llm.llm_engine.step()
    assert len(recorded_by(llm)) == 1
    llm.sleep(level=level, mode=mode)
    return alone


@pytest.mark.parametrize("name", ["sparsed", "SPARSED"])
def test_the_backend_is_known_by_its_name(llada, llada_path, name):
    named = start_engine(llada_path, attention_backend=name)
    extra = {"use_sparsed": 1, "steps": 8, "sparsed_block_size": 16}
    assert generate(named, prompts(), extra) == generate(llada, prompts(), extra)


def test_another_backend_runs_dense_and_refuses_sparsity(llada, llada_path):
    name = "TRITON_ATTN" if torch.cuda.is_available() else "CPU_ATTN"
    other = start_engine(llada_path, attention_backend=name)
    assert generate(other, prompts(), {"steps": 8}) == generate(llada, prompts(), {"steps": 8})
    with pytest.raises(ValueError, match="--attention-backend sparsed"):
        generate(other, prompts(), {"use_sparsed": 1})


def test_an_engine_s_own_defaults_hold(llada, llada_path):
    settings = {"sparsed": {"min_length": 0, "block_size": 16, "select": 0.1}}
    eager = start_engine(llada_path, additional_config=settings)
    extra = {"use_sparsed": 1, "sparsed_block_size": 16, "sparsed_select": 0.1}
    assert generate(eager, prompts(), {}) == generate(llada, prompts(), extra)


BAD = [
    ({"sparsed_mass": 1}, r"sparsed_mass must be a number in \(0, 1\), got 1\. Use 0\.95"),
    ({"sparsed_mass": math.nan}, r"sparsed_mass must be a number in \(0, 1\), got nan"),
    ({"sparsed_mass": 0.9, "use_sparsed": 0}, "sparsed_mass must be absent when use_sparsed is 0"),
    ({"sparsed_mass": 0.9, "variable_length": 1}, "must be absent when variable_length is set"),
    ({"sparsed_refresh": 0}, r"sparsed_refresh must be an integer of at least 1"),
    ({"sparsed_refresh": 9}, r"sparsed_refresh must be an integer in \[1, 8\] .*, got 9\. Lower"),
    ({"sparsed_refresh": 4, "use_sparsed": 0}, "sparsed_refresh must be absent when use_sparsed"),
]


@pytest.mark.parametrize(("extra", "message"), BAD, ids=str)
def test_a_request_s_bad_settings_are_refused_by_name(llada, extra, message):
    with pytest.raises(ValueError, match=message):
        generate(llada, prompts()[:1], {"use_sparsed": 1, "steps": 8, **extra})


def test_an_engine_refuses_settings_it_does_not_know(llada_path):
    with pytest.raises(ValueError, match=r"sparsed\.keep must be absent"):
        start_engine(llada_path, additional_config={"sparsed": {"keep": 1}})


def test_a_table_that_outgrows_its_memory_is_refused(llada_path):
    small = start_engine(llada_path, additional_config={"sparsed": {"table_ids": 1}})
    extra = {"use_sparsed": 1, "sparsed_block_size": 16}
    for whole in ({"sparsed_select": 1}, {"sparsed_mass": 0.5}):
        with pytest.raises(ValueError, match=r"sparsed_block_size .* raise sparsed\.table_ids"):
            generate(small, prompts(), {**extra, **whole})
    tall = {**extra, "sparsed_select": 1, "sparsed_query_block_size": 128}
    assert len(generate(small, prompts(), tall)) == len(LENGTHS)
    extra |= {"sparsed_mass": 0.5, "sparsed_block_size": 128}
    assert len(generate(small, prompts(), extra)) == len(LENGTHS)


def test_the_published_scale_keeps_the_published_blocks(llada, llada_path, monkeypatch):
    case = {"max_tokens": 32, "steps": 8, "sparsed_block_size": 16, "sparsed_select": 0.1}
    own = expected("llada", llada_path, case)
    published = expected("llada", llada_path, {**case, "sparsed_published_scale": True})
    assert any(not torch.equal(a.masks, b.masks) for a, b in zip(own, published, strict=True))
    score_as_published(monkeypatch)
    extras = {name: value for name, value in case.items() if name != "max_tokens"}
    params = sampling({**extras, "use_sparsed": 1})
    compared = 0
    for prompt, run in zip(prompts(), published, strict=True):
        if run.met_a_tie():
            continue
        llada.llm_engine.add_request("0", {"prompt_token_ids": prompt}, params)
        while llada.llm_engine.has_unfinished_requests():
            if recorded_by(llada):
                masks = masks_of(llada, len(prompt) + 32, 16)
            finished = llada.llm_engine.step()
        assert list(finished[0].outputs[0].token_ids) == run.ids
        assert torch.equal(masks, run.masks)
        compared += 1
    assert compared >= 2


def score_as_published(monkeypatch):
    """Score blocks with 1/sqrt(num_heads), as the authors' LLaDA code does by a slip."""
    score = api.block_scores

    def scaled(q, k, lse, layout, selection, *, scale):
        return score(q, k, None, layout, selection, scale=q.shape[1] ** -0.5)

    monkeypatch.setattr(api, "block_scores", scaled)
