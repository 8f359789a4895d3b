# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""SparseD inside the engine: its tokens against the oracle's, in any batch."""

import random

import oracle
import pytest
import torch
from checkpoints import DREAM_MASK_ID, LLADA_MASK_ID
from engines import start_engine
from sparse_oracle import Sparsity, sparse_dream_generate, sparse_llada_generate
from vllm import SamplingParams

pytestmark = pytest.mark.engine

LENGTHS = (1, 17, 100, 301)
LLADA_CASES = [
    {"max_tokens": 32, "steps": 16, "sparsed_block_size": 32},
    {"max_tokens": 32, "steps": 16, "block_length": 8, "sparsed_block_size": 16},
    {"max_tokens": 33, "steps": 11, "sparsed_block_size": 16, "sparsed_select": 0.1},
    {"max_tokens": 24, "steps": 24, "sparsed_block_size": 64, "sparsed_skip": 0.5},
    {"max_tokens": 32, "steps": 8, "sparsed_block_size": 128, "sparsed_skip": 0},
    {"max_tokens": 32, "steps": 32, "threshold": 0.05, "sparsed_block_size": 16},
]
DREAM_CASES = [
    {"max_tokens": 32, "steps": 16, "alg": alg, "sparsed_block_size": 16}
    for alg in ("maskgit_plus", "topk_margin", "entropy")
]


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


def compare(actual, expected):
    decided = [(ids, run) for ids, run in zip(actual, expected, strict=True) if not run.met_a_tie()]
    assert decided, "every run met a tie"
    for ids, run in decided:
        assert ids == run.ids


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def state_of(llm):
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.model_state


def patterns_of(llm):
    return state_of(llm).patterns


ORACLES = {
    "llada": (oracle.load_llada, sparse_llada_generate, "gen_length", LLADA_MASK_ID),
    "dream": (oracle.load_dream, sparse_dream_generate, "max_new_tokens", DREAM_MASK_ID),
}


def expected(family, path, case):
    """The oracle's runs of all prompts."""
    load, generate, length_name, mask_id = ORACLES[family]
    num_tokens, rest, sparsity = split(case)
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
    compare(actual, expected(family, path, case))


def test_keeping_every_block_is_dense(llada):
    dense = generate(llada, prompts(), {"steps": 16})
    whole = {"steps": 16, "use_sparsed": 1, "sparsed_select": 1, "sparsed_block_size": 16}
    assert generate(llada, prompts(), whole) == dense


def test_short_requests_stay_dense_unless_they_ask(llada):
    llada.llm_engine.add_request("1", {"prompt_token_ids": [1] * 50}, sampling({}, 8))
    while llada.llm_engine.has_unfinished_requests():
        llada.llm_engine.step()
        assert not patterns_of(llada)


def mixed_requests():
    """Requests whose phases differ at every step: (prompts, parameters)."""
    draw = random.Random(4)
    batch, extras = [], []
    for _ in range(8):
        batch.append([draw.randrange(256) for _ in range(draw.choice((1, 30, 129, 250)))])
        sparse = {"use_sparsed": 1, "sparsed_block_size": draw.choice((16, 32, 64))}
        sparse["sparsed_skip"] = draw.choice((0, 0.2, 0.6))
        sparse["sparsed_select"] = draw.choice((0.1, 0.3, 0.5))
        extras.append({"steps": draw.choice((8, 16)), **draw.choice(({}, sparse, sparse))})
    return batch, extras


def test_batch_mates_in_other_phases_change_no_token(llada):
    batch, extras = mixed_requests()
    together = generate(llada, batch, extras)
    alone = [generate(llada, [one], [x])[0] for one, x in zip(batch, extras, strict=True)]
    assert together == alone


@pytest.mark.parametrize("after", [1, 4, 7, 12])
def test_a_preempted_sparse_request_ends_as_if_undisturbed(llada, after):
    extra = {"steps": 16, "block_length": 8, "use_sparsed": 1, "sparsed_block_size": 32}
    undisturbed = generate(llada, prompts(), extra)
    engine = llada.llm_engine
    for i, prompt in enumerate(prompts()):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling(extra))
    finished = [out for _ in range(after) for out in engine.step() if out.finished]
    assert scheduler_of(llada).reset_prefix_cache(reset_running_requests=True)
    while engine.has_unfinished_requests():
        finished += [out for out in engine.step() if out.finished]
    got = {out.request_id: list(out.outputs[0].token_ids) for out in finished}
    assert [got[str(i)] for i in range(len(undisturbed))] == undisturbed


def test_a_table_goes_with_its_request(llada):
    engine = llada.llm_engine
    extra = {"use_sparsed": 1, "sparsed_skip": 0}
    for i in range(4):
        engine.add_request(str(i), {"prompt_token_ids": [i] * 20}, sampling(extra, 16))
    for _ in range(3):
        engine.step()
    assert len(patterns_of(llada)) == 4
    engine.abort_request(["0", "2"])
    engine.step()
    assert len(patterns_of(llada)) == 2
    while engine.has_unfinished_requests():
        engine.step()
    engine.step()
    assert not patterns_of(llada)


@pytest.mark.parametrize(
    ("extra", "tokens"), [({}, 58), ({"steps": 1}, 0), ({"use_sparsed": 0}, 0)], ids=str
)
def test_room_for_a_table_is_claimed_only_by_requests_that_record_one(llada, extra, tokens):
    engine, scheduler = llada.llm_engine, scheduler_of(llada)
    params = sampling({"use_sparsed": 1, **extra}, 8)
    engine.add_request("0", {"prompt_token_ids": [1] * 50}, params)
    before = scheduler._room().table_tokens
    (claim,) = [scheduler._claim(request) for request in scheduler.waiting]
    assert claim.table_tokens == tokens
    while engine.has_unfinished_requests():
        engine.step()
        held = sum(request.num_tokens for request in scheduler.running) and tokens
        assert scheduler._room().table_tokens == before - held


def test_what_profiling_sets_aside_holds_the_tables_of_a_full_step(llada):
    state, engine = state_of(llada), llada.llm_engine
    extra = {"use_sparsed": 1, "sparsed_skip": 0, "sparsed_select": 1, "sparsed_block_size": 16}
    count = state.max_num_tokens // 512
    for i in range(count):
        engine.add_request(str(i), {"prompt_token_ids": [i] * 496}, sampling(extra, 16))
    for _ in range(2):
        engine.step()
    assert len(patterns_of(llada)) == count
    taken = sum(pattern.num_bytes for pattern in patterns_of(llada).values())
    assert 0 < taken <= state.largest_tables().nbytes
    engine.abort_request([str(i) for i in range(count)])
    engine.step()


@pytest.mark.parametrize(("level", "steps_left"), [(0, 4), (1, 10), (2, 10)])
def test_a_request_kept_through_sleep_starts_over_if_its_pages_are_gone(llada, level, steps_left):
    # On the CPU memory stays where it is; what vLLM tells scheduler and workers is the same.
    alone = fall_asleep_after(6, llada, level, mode="keep")
    assert not llada.llm_engine.step()
    before = list(patterns_of(llada).values())
    llada.wake_up()
    (output,) = [out for _ in range(steps_left) for out in llada.llm_engine.step()]
    assert output.finished
    assert list(output.outputs[0].token_ids) == alone
    assert (list(patterns_of(llada).values()) == before) == (level == 0)
    llada.llm_engine.step()
    assert not patterns_of(llada)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_no_table_of_an_aborted_request_outlives_sleep(llada, level):
    fall_asleep_after(6, llada, level, mode="abort")
    llada.wake_up()
    llada.llm_engine.step()
    assert not patterns_of(llada)
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
    assert len(patterns_of(llm)) == 1
    llm.sleep(level=level, mode=mode)
    return alone


@pytest.mark.parametrize("name", ["sparsed", "SPARSED"])
def test_the_backend_is_known_by_its_name(llada, llada_path, name):
    named = start_engine(llada_path, attention_backend=name)
    extra = {"use_sparsed": 1, "steps": 8, "sparsed_block_size": 16}
    assert generate(named, prompts(), extra) == generate(llada, prompts(), extra)


def test_another_backend_runs_dense_and_refuses_sparsity(llada, llada_path):
    other = start_engine(llada_path, attention_backend="CPU_ATTN")
    assert generate(other, prompts(), {"steps": 8}) == generate(llada, prompts(), {"steps": 8})
    with pytest.raises(ValueError, match="--attention-backend sparsed"):
        generate(other, prompts(), {"use_sparsed": 1})


def test_an_engine_s_own_defaults_hold(llada, llada_path):
    settings = {"sparsed": {"min_length": 0, "block_size": 16, "select": 0.1}}
    eager = start_engine(llada_path, additional_config=settings)
    extra = {"use_sparsed": 1, "sparsed_block_size": 16, "sparsed_select": 0.1}
    assert generate(eager, prompts(), {}) == generate(llada, prompts(), extra)


def test_an_engine_refuses_settings_it_does_not_know(llada_path):
    with pytest.raises(ValueError, match=r"sparsed\.keep must be absent"):
        start_engine(llada_path, additional_config={"sparsed": {"keep": 1}})


def test_a_table_that_outgrows_its_memory_is_refused(llada_path):
    small = start_engine(llada_path, additional_config={"sparsed": {"table_ids": 1}})
    extra = {"use_sparsed": 1, "sparsed_block_size": 16, "sparsed_select": 1}
    with pytest.raises(ValueError, match=r"sparsed_block_size .* raise sparsed\.table_ids"):
        generate(small, prompts(), extra)
    extra["sparsed_block_size"] = 128
    assert len(generate(small, prompts(), extra)) == len(LENGTHS)


def test_the_published_scale_keeps_the_published_blocks(llada_path):
    case = {"max_tokens": 32, "steps": 8, "sparsed_block_size": 16, "sparsed_select": 0.1}
    scaled = start_engine(llada_path, additional_config={"sparsed": {"published_scale": 1}})
    own = expected("llada", llada_path, case)
    published = expected("llada", llada_path, {**case, "sparsed_published_scale": True})
    assert any(not torch.equal(a.masks, b.masks) for a, b in zip(own, published, strict=True))
    extras = {name: value for name, value in case.items() if name != "max_tokens"}
    params = sampling({**extras, "use_sparsed": 1})
    for prompt, run in zip(prompts(), published, strict=True):
        if run.met_a_tie():
            continue
        scaled.llm_engine.add_request("0", {"prompt_token_ids": prompt}, params)
        tables = []
        while scaled.llm_engine.has_unfinished_requests():
            finished = scaled.llm_engine.step()
            tables += patterns_of(scaled).values()
        assert list(finished[0].outputs[0].token_ids) == run.ids
        assert torch.equal(mask_of(tables[-1]), run.masks)


def mask_of(pattern):
    """bool [num_layers, num_heads, num_blocks, num_blocks]: the key blocks that a table lists."""
    kept, num_kept = (table.transpose(1, 2) for table in (pattern.kept, pattern.num_kept))
    counts = torch.arange(kept.shape[-1]) < num_kept[..., None]
    width = pattern.blocks.max_key_blocks
    mask = torch.zeros(*kept.shape[:-1], width + 1, dtype=torch.bool)
    return mask.scatter_(-1, kept.long().where(counts, width), True)[..., :width]
