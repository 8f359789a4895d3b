# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Keys and values that requests reuse between steps: tokens against the oracle's, in any batch."""

import functools
import math
import random
from collections import defaultdict

import oracle
import pytest
import torch
from checkpoints import DREAM_MASK_ID, LLADA_MASK_ID
from engines import MAY_REUSE, scheduler_of, start_engine, state_of
from reuse_oracle import Reuse, reusing_dream_generate, reusing_llada_generate
from sparse_oracle import Sparsity
from vllm import SamplingParams

from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.layout import KEY_LEN, PAGE, BatchLayout
from sparsed_vllm.steps import Source

pytestmark = pytest.mark.engine

LENGTHS = (1, 17, 100, 301)


def prompts(seed=2):
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(length)] for length in LENGTHS]


def sampling(extra, max_tokens=32, **rest):
    given = {"temperature": 0, "ignore_eos": True, "detokenize": False, **rest}
    return SamplingParams(max_tokens=max_tokens, extra_args=extra, **given)


def generate(llm, batch, extras, max_tokens=32, **rest):
    """[len(batch)] the token ids of each request; extras: its parameters, one for all or each."""
    extras = [extras] * len(batch) if isinstance(extras, dict) else extras
    params = [sampling(extra, max_tokens, **rest) for extra in extras]
    requests = [{"prompt_token_ids": prompt} for prompt in batch]
    outputs = llm.generate(requests, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture
def engine_of(request):
    """The engine of a family whose requests may reuse keys and values."""
    return lambda family: request.getfixturevalue(f"reusing_{family}")


SPARSE_WHOLE = {"use_sparsed": 1, "sparsed_select": 1, "sparsed_block_size": 16}
WAYS_TO_DECODE = [
    ("llada", {"steps": 16}),
    ("llada", {"steps": 16, "block_length": 8}),
    ("llada", {"threshold": 0.25}),
    ("llada", {"threshold": 0.2, "block_length": 8}),
    ("llada", {"steps": 16, **SPARSE_WHOLE}),
    ("llada", {"steps": 16, "block_length": 8, **SPARSE_WHOLE}),
    ("llada", {"threshold": 0.2, "block_length": 8, **SPARSE_WHOLE}),
    ("llada", {"steps": 12, "remasking": "random"}),
    ("dream", {"steps": 16, "alg": "entropy"}),
    ("dream", {"steps": 16, "alg": "maskgit_plus", "block_length": 8}),
    ("dream", {"steps": 16, "alg": "topk_margin"}),
    ("dream", {"steps": 16, "alg": "origin"}),
    ("dream", {"threshold": 0.2, "block_length": 8}),
    ("dream", {"steps": 16, "alg": "entropy", **SPARSE_WHOLE}),
]


@pytest.mark.parametrize(("family", "extra"), WAYS_TO_DECODE, ids=str)
def test_choosing_every_token_is_exact(engine_of, family, extra):
    llm = engine_of(family)
    every = {"kv_share": 0.9999}  # of less than 10,000 tokens, rounded up
    assert generate(llm, prompts(), {**extra, **every}) == exact_tokens(llm, tuple(extra.items()))


@pytest.mark.parametrize("reuse", [{"kv_share": 1}, {"kv_share": 0, "kv_refresh": 1}], ids=str)
@pytest.mark.parametrize(("family", "extra"), [WAYS_TO_DECODE[i] for i in (1, 5, 8)], ids=str)
def test_a_share_of_1_and_a_refresh_at_every_step_are_exact(engine_of, family, extra, reuse):
    llm = engine_of(family)
    given = {**extra, **reuse, "kv_reuse": 1}
    assert generate(llm, prompts(), given) == exact_tokens(llm, tuple(extra.items()))


@functools.cache
def exact_tokens(llm, extra):
    """Those of prompts(); several tests compare with the same."""
    return generate(llm, prompts(), dict(extra))


LOADERS = {
    "llada": (oracle.load_llada, reusing_llada_generate, "gen_length", LLADA_MASK_ID),
    "dream": (oracle.load_dream, reusing_dream_generate, "max_new_tokens", DREAM_MASK_ID),
}


def expected(family, path, extra, batch, max_tokens=32):
    """The oracle's runs of a request's parameters."""
    asked = tuple(extra.items())
    return [run_of(family, path, asked, tuple(prompt), max_tokens) for prompt in batch]


@functools.cache
def run_of(family, path, extra, prompt, max_tokens):
    """One of them; several tests compare with the same."""
    load, generate_reusing, length_name, mask_id = LOADERS[family]
    parts = {"kv": {}, "sparsed": {}, "": {}}
    for name, value in extra:
        prefix, _, rest = name.partition("_")
        own = prefix if prefix in parts else ""
        parts[own][rest if own else name] = value
    denoising = {"steps": max_tokens, "block_length": max_tokens, **parts[""]}
    sparsity = Sparsity(**parts["sparsed"]) if denoising.pop("use_sparsed", 0) else None
    given = {length_name: max_tokens, "mask_id": mask_id, "sparsity": sparsity, **denoising}
    if family == "dream":
        given = {"alg": "maskgit_plus", **given}
    return generate_reusing(load(path), prompt, reuse=Reuse(**parts["kv"]), **given)


SPARSE = {"use_sparsed": 1, "sparsed_block_size": 16}
AGAIN = {"sparsed_mass": 0.45, "sparsed_refresh": 6}
BOTH = {"kv_choice": "both"}
STALE = [
    ("llada", {"steps": 16, "kv_share": 0}),
    ("llada", {"steps": 16, "kv_share": 0.02}),
    ("llada", {"steps": 16, "kv_share": 0.1, "kv_every": 2}),
    ("llada", {"steps": 16, "kv_share": 0.02, "kv_refresh": 4}),
    ("llada", {"steps": 16, "kv_share": 0.1, "kv_every": 3, "kv_refresh": 5}),
    ("llada", {"steps": 16, "block_length": 8, "kv_share": 0}),
    ("llada", {"steps": 16, "block_length": 8, "kv_share": 0.1}),
    ("llada", {"steps": 8, "block_length": 4, "kv_share": 0.02, "kv_every": 2}),
    ("llada", {"threshold": 0.25, "kv_share": 0.1}),
    ("llada", {"threshold": 0.2, "block_length": 8, "kv_share": 0.1, "kv_refresh": 4}),
    ("llada", {"steps": 16, "kv_share": 0, **SPARSE}),
    ("llada", {"steps": 16, "kv_share": 0.1, **SPARSE}),
    ("llada", {"steps": 16, "block_length": 8, "kv_share": 0.1, "kv_refresh": 4, **SPARSE}),
    ("llada", {"steps": 16, "kv_share": 0.02, **SPARSE, "sparsed_block_size": 64}),
    ("llada", {"steps": 16, "kv_share": 0.1, **SPARSE, "sparsed_query_block_size": 64}),
    ("llada", {"steps": 16, "kv_share": 0.1, "kv_refresh": 4, **SPARSE, "sparsed_refresh": 4}),
    ("llada", {"threshold": 0.2, "block_length": 8, "kv_share": 0.02, **SPARSE, **AGAIN}),
    ("dream", {"steps": 16, "alg": "entropy", "kv_share": 0}),
    ("dream", {"steps": 16, "alg": "maskgit_plus", "kv_share": 0.1}),
    ("dream", {"steps": 16, "alg": "topk_margin", "kv_share": 0.02, "kv_every": 2}),
    ("dream", {"steps": 16, "alg": "entropy", "block_length": 8, "kv_share": 0.1}),
    ("dream", {"threshold": 0.2, "block_length": 8, "kv_share": 0.1, "kv_refresh": 4}),
    ("dream", {"steps": 16, "alg": "entropy", "kv_share": 0.1, **SPARSE}),
    ("dream", {"steps": 16, "alg": "entropy", "kv_share": 0.1, "kv_refresh": 3, **SPARSE, **AGAIN}),
    ("llada", {"steps": 16, "kv_share": 0.05, "kv_choice": "match"}),
    ("llada", {"steps": 16, "kv_share": 0.02, "kv_choice": "both"}),
    ("llada", {"steps": 16, "block_length": 8, "kv_share": 0.1, "kv_every": 3, **BOTH}),
    ("llada", {"threshold": 0.2, "block_length": 8, "kv_share": 0.1, "kv_refresh": 4, **BOTH}),
    ("llada", {"steps": 16, "kv_share": 0.1, **SPARSE, **BOTH}),
    ("dream", {"steps": 16, "alg": "entropy", "kv_share": 0.1, "kv_choice": "match"}),
    ("dream", {"steps": 16, "alg": "topk_margin", "kv_share": 0.02, "kv_every": 2, **BOTH}),
]


@pytest.mark.parametrize(("family", "extra"), STALE, ids=str)
def test_a_light_step_sees_stale_keys_and_values_of_what_it_does_not_compute(
    request, engine_of, family, extra
):
    path = request.getfixturevalue(f"{family}_path")
    actual = generate(engine_of(family), prompts(), extra)
    oracle.assert_same_tokens(actual, expected(family, path, extra, prompts()))


CHOOSING = [(family, extra) for family, extra in STALE if extra["kv_share"] > 0]


@pytest.mark.parametrize(("family", "extra"), CHOOSING, ids=str)
def test_light_steps_compute_the_tokens_that_drew_most_attention(
    request, engine_of, monkeypatch, family, extra
):
    path, llm = request.getfixturevalue(f"{family}_path"), engine_of(family)
    batch = [prompt for prompt in prompts() if len(prompt) > 50]
    runs = expected(family, path, extra, batch)
    assert not any(run.met_a_tie() for run in runs)
    for prompt, run in zip(batch, runs, strict=True):
        with monkeypatch.context() as patch:
            chosen = choices_of(llm, patch)
            generate(llm, [prompt], extra)
        assert chosen == run.chosen[: len(chosen)]
        assert len(chosen) == run.forwards
    assert any(any(run.chosen) for run in runs)


def choices_of(llm, monkeypatch):
    """Filled as requests run: by step, the places before its canvas that the first one computes."""
    mass, found = state_of(llm).mass, []
    choose = mass.choose

    def spy(starts, slots, steps, plans, tokens):
        light = choose(starts, slots, steps, plans, tokens)
        places = [] if light is None else light.places[light.seqs == 0].tolist()
        found.append(sorted(place for place in places if place < steps[0].first_row))
        return light

    monkeypatch.setattr(mass, "choose", spy)
    return found


LIGHT = {"steps": 16, "kv_share": 0.1}
PHASES = [
    {"steps": 16},
    {"steps": 12, **SPARSE, "sparsed_skip": 0.3, "sparsed_mass": 0.5, "sparsed_refresh": 3},
    {"steps": 12, **SPARSE},
    LIGHT,
    {"steps": 12, "kv_share": 0.02, "kv_every": 2, "block_length": 8},
    {"steps": 16, "kv_share": 0, "kv_refresh": 3},
    {**LIGHT, **SPARSE},
    {**LIGHT, **SPARSE, "kv_refresh": 5, "block_length": 8, "sparsed_refresh": 5},
    {**LIGHT, **SPARSE, "sparsed_block_size": 64, "kv_refresh": 5, "block_length": 8},
    {"threshold": 0.2, "kv_share": 0.1, "block_length": 8},
    {"steps": 16, "remasking": "random", "kv_share": 0.1},
    {"steps": 16, "kv_share": 0.05, "kv_choice": "match"},
    {"steps": 12, "kv_share": 0.1, "kv_every": 2, "block_length": 8, **BOTH},
]


def mixed_requests(count, seed=4):
    """Requests whose phases and sources differ at every step: (prompts, parameters)."""
    draw = random.Random(seed)
    lengths = (1, 30, 129, 250, 400)
    batch = [[draw.randrange(256) for _ in range(draw.choice(lengths))] for _ in range(count)]
    return batch, [PHASES[i % len(PHASES)] for i in draw.sample(range(count), count)]


def alone(llm, batch, extras, **rest):
    """[len(batch)] the token ids of each request, run by itself."""
    return [generate(llm, [one], [x], **rest)[0] for one, x in zip(batch, extras, strict=True)]


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_batch_mates_in_other_phases_change_no_token(reusing_llada, temperature):
    batch, extras = mixed_requests(20)
    rest = {"temperature": temperature, "seed": 3}
    together = generate(reusing_llada, batch, extras, **rest)
    assert together == alone(reusing_llada, batch, extras, **rest)


def test_async_scheduling_changes_no_token(reusing_llada, async_reusing_llada):
    batch, extras = mixed_requests(20)
    expected = generate(reusing_llada, batch, extras)
    assert generate(async_reusing_llada, batch, extras) == expected


def add(llm, request_id, prompt, extra, **rest):
    llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, sampling(extra, **rest))


def run_steps(llm, count=None):
    """[finished outputs] of `count` engine steps, or of all there are."""
    engine, finished = llm.llm_engine, []
    while engine.has_unfinished_requests() if count is None else count:
        finished += [out for out in engine.step() if out.finished]
        count = None if count is None else count - 1
    return finished


def tokens_by_id(finished):
    return {out.request_id.split("-")[0]: list(out.outputs[0].token_ids) for out in finished}


@pytest.fixture(scope="module")
def eight_requests(reusing_llada):
    """(prompts, parameters, the tokens that they get undisturbed)"""
    batch, extras = mixed_requests(8, seed=9)
    return batch, extras, generate(reusing_llada, batch, extras)


@pytest.mark.parametrize("name", ["reusing_llada", "async_reusing_llada"])
@pytest.mark.parametrize("after", [1, 4, 7, 11])
def test_preempted_requests_end_as_if_undisturbed(request, eight_requests, name, after):
    llm = request.getfixturevalue(name)
    batch, extras, undisturbed = eight_requests
    for i, (prompt, extra) in enumerate(zip(batch, extras, strict=True)):
        add(llm, f"{i}", prompt, extra)
    finished = run_steps(llm, after)
    assert scheduler_of(llm).reset_prefix_cache(reset_running_requests=True)
    got = tokens_by_id(finished + run_steps(llm))
    assert [got[str(i)] for i in range(8)] == undisturbed


def test_a_preempted_request_computes_all_tokens_first(reusing_llada, monkeypatch):
    rows = rows_sent(reusing_llada, monkeypatch)
    add(reusing_llada, "0", [5] * 100, {"steps": 8, "kv_share": 0.1})
    run_steps(reusing_llada, 3)
    assert scheduler_of(reusing_llada).reset_prefix_cache(reset_running_requests=True)
    run_steps(reusing_llada)
    assert rows == [[132], [42], [42], [132], *[[42]] * 7]


def rows_sent(llm, monkeypatch):
    """Filled as steps are sent: the rows of each one's requests."""
    scheduler, found = scheduler_of(llm), []
    schedule = scheduler.schedule

    def spy(*args, **kwargs):
        output = schedule(*args, **kwargs)
        found.append(list(output.num_scheduled_tokens.values()))
        return output

    monkeypatch.setattr(scheduler, "schedule", spy)
    return found


@pytest.mark.parametrize("extra", [LIGHT, {**LIGHT, **SPARSE}], ids=str)
@pytest.mark.parametrize(("level", "steps_left"), [(0, 10), (1, 16), (2, 16)])
def test_a_request_kept_through_sleep_starts_over_if_its_pages_are_gone(
    reusing_llada, level, steps_left, extra
):
    (undisturbed,) = generate(reusing_llada, [[5] * 100], extra)
    add(reusing_llada, "0", [5] * 100, extra)
    run_steps(reusing_llada, 6)
    reusing_llada.sleep(level=level, mode="keep")
    if level > 0:  # what sleep mode would give back to others
        spoil_pages(reusing_llada)
    assert not reusing_llada.llm_engine.step()
    reusing_llada.wake_up()
    (output,) = run_steps(reusing_llada, steps_left)
    assert list(output.outputs[0].token_ids) == undisturbed


def spoil_pages(llm):
    for layer in layers_of(llm):
        layer.kv_cache.fill_(float("nan"))


def layers_of(llm):
    return state_of(llm).vllm_config.compilation_config.static_forward_context.values()


def test_what_others_left_in_pages_reaches_nobody(reusing_llada):
    batch, extras = mixed_requests(8, seed=12)
    before = generate(reusing_llada, batch, extras)
    spoil_pages(reusing_llada)
    state_of(reusing_llada).mass.mass.fill_(float("nan"))
    assert generate(reusing_llada, batch, extras) == before


def test_aborts_leave_no_trace_and_harm_nobody(reusing_llada):
    scheduler, pool = scheduler_of(reusing_llada), free_pages_of(reusing_llada)
    batch, extras = mixed_requests(8, seed=7)
    undisturbed = alone(reusing_llada, batch, extras)
    for i, (prompt, extra) in enumerate(zip(batch, extras, strict=True)):
        add(reusing_llada, f"{i}", prompt, extra)
    finished = run_steps(reusing_llada, 3)
    reusing_llada.llm_engine.abort_request(["1", "4", "6"])
    got = tokens_by_id(finished + run_steps(reusing_llada))
    assert got == {str(i): undisturbed[i] for i in (0, 2, 3, 5, 7)}
    run_steps(reusing_llada, 2)  # an idle step tells the worker what has finished
    assert not scheduler.requests and not state_of(reusing_llada).requests
    assert free_pages_of(reusing_llada) == pool
    assert alone(reusing_llada, batch[1:2], extras[1:2]) == undisturbed[1:2]


def free_pages_of(llm):
    return scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def test_light_requests_share_a_step_that_could_not_hold_their_tokens(reusing_llada, monkeypatch):
    batch, extra = [[i] * 300 for i in range(6)], {"steps": 12, "kv_share": 0.02}
    undisturbed = generate(reusing_llada, batch, extra)
    rows = rows_sent(reusing_llada, monkeypatch)
    monkeypatch.setattr(scheduler_of(reusing_llada), "max_num_scheduled_tokens", 550)
    assert generate(reusing_llada, batch, extra) == undisturbed
    assert max(map(sum, rows)) <= 550
    assert [38] * 6 in rows
    assert {count for step in rows for count in step} == {332, 38}


def test_light_requests_pause_for_the_first_step_of_a_newcomer(reusing_llada, monkeypatch):
    batch, extra = [[i] * 100 for i in range(3)] + [[3] * 300], {"steps": 32, "kv_share": 0.1}
    undisturbed = alone(reusing_llada, batch, [extra] * 4)
    monkeypatch.setattr(scheduler_of(reusing_llada), "max_num_scheduled_tokens", 400)
    for i, prompt in enumerate(batch[:3]):
        add(reusing_llada, f"{i}", prompt, extra)
    run_steps(reusing_llada, 4)
    rows = rows_sent(reusing_llada, monkeypatch)
    add(reusing_llada, "3", batch[3], extra)
    got = tokens_by_id(run_steps(reusing_llada))
    assert any(332 in step for step in rows[:3])
    assert [got[str(i)] for i in range(4)] == undisturbed


def test_requests_that_take_turns_get_the_same_tokens(
    reusing_llada, async_reusing_llada, monkeypatch
):
    batch, extras = mixed_requests(20, seed=13)
    undisturbed = generate(reusing_llada, batch, extras)
    for llm in (reusing_llada, async_reusing_llada):
        monkeypatch.setattr(scheduler_of(llm), "max_num_scheduled_tokens", 450)
        assert generate(llm, batch, extras) == undisturbed


@pytest.mark.parametrize("extra", [{"steps": 16}, {"steps": 16, **SPARSE}], ids=str)
def test_an_exact_request_gets_what_an_engine_without_reuse_gives(llada, reusing_llada, extra):
    assert generate(reusing_llada, prompts(), extra) == generate(llada, prompts(), extra)
    assert generate(reusing_llada, prompts(), {**extra, "kv_reuse": 0}) == generate(
        llada, prompts(), {**extra, "kv_reuse": 0}
    )


def test_pages_hold_keys_and_values_only_where_requests_may_reuse_them(llada, reusing_llada):
    for without, layer in zip(layers_of(llada), layers_of(reusing_llada), strict=True):
        pages = layer.impl.pages
        more = 2 * PAGE * pages.num_kv_heads * pages.head_size * 4
        assert layer.kv_cache[0].nbytes == without.kv_cache[0].nbytes + more


def test_an_engine_s_own_defaults_hold(reusing_llada, llada_path):
    own = {"share": 0.1, "every": 2, "refresh": 5, "choice": "both"}
    settings = {"reuse": {**own, "layers": MAY_REUSE["reuse"]["layers"]}}
    by_default = start_engine(llada_path, additional_config=settings)
    asked = {"steps": 16, "kv_share": 0.1, "kv_every": 2, "kv_refresh": 5, **BOTH}
    for extra, same in [
        ({}, asked),
        ({"kv_reuse": 1}, asked),
        ({"kv_share": 0}, {**asked, "kv_share": 0}),
        ({"kv_reuse": 0}, {}),
    ]:
        expected = generate(reusing_llada, prompts(), {"steps": 16, **same})
        assert generate(by_default, prompts(), {"steps": 16, **extra}) == expected


def test_samples_of_one_request_are_those_of_the_exact_engine(reusing_llada):
    drawn = {"n": 3, "temperature": 0.9, "seed": 5}
    samples = []
    for extra in ({"steps": 16}, {"steps": 16, "kv_share": 0.9999}):
        (output,) = reusing_llada.generate(
            [{"prompt_token_ids": prompts()[2]}], sampling(extra, **drawn), use_tqdm=False
        )
        samples.append([list(sample.token_ids) for sample in output.outputs])
    assert samples[0] == samples[1]
    assert len({tuple(ids) for ids in samples[0]}) == 3


@pytest.mark.parametrize("extra", [LIGHT, {**LIGHT, "block_length": 8}, {**LIGHT, **SPARSE}])
def test_log_probabilities_are_those_of_the_step_that_filled_the_place(
    reusing_llada, llada_path, extra
):
    batch = prompts()[1:]
    outputs = reusing_llada.generate(
        [{"prompt_token_ids": prompt} for prompt in batch],
        sampling(extra, logprobs=2),
        use_tqdm=False,
    )
    for output, run in zip(outputs, expected("llada", llada_path, extra, batch), strict=True):
        assert not run.met_a_tie()
        (answer,) = output.outputs
        assert list(answer.token_ids) == run.ids
        found = [at[token].logprob for token, at in zip(run.ids, answer.logprobs, strict=True)]
        assert found == pytest.approx(run.logprobs, abs=1e-4)


def test_blocks_are_handed_out_as_they_are_finished(reusing_llada):
    extra = {"steps": 16, "block_length": 8, "kv_share": 0.1}
    (whole,) = generate(reusing_llada, prompts()[2:3], extra)
    add(reusing_llada, "0", prompts()[2], extra)
    seen = []
    while reusing_llada.llm_engine.has_unfinished_requests():
        seen += [list(out.outputs[0].token_ids) for out in reusing_llada.llm_engine.step()]
    assert seen == [whole[:end] for end in (8, 16, 24, 32)]


def test_a_step_that_reads_nothing_leaves_no_choice_to_chance(reusing_dream, monkeypatch):
    # 32 places in 64 steps: Dream's first step fills none, and no row of it is read.
    extra = {"steps": 64, "alg": "entropy", "kv_share": 0.1}
    prompt = prompts()[2]
    seen = []
    for other in (prompts()[3], prompts()[3][::-1]):
        generate(reusing_dream, [other], {**extra, "steps": 8})
        with monkeypatch.context() as patch:
            chosen = choices_of(reusing_dream, patch)
            generate(reusing_dream, [prompt], extra)
        seen.append(chosen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "kernel", ["block_scores", "select_blocks", "paged_block_sparse_attention"]
)
def test_a_kernel_s_failure_for_one_request_changes_no_token_of_others(
    reusing_llada, monkeypatch, kernel
):
    batch = [[3] * 30, [5] * 90, [7] * 200, [9] * 250]
    extras = [{**LIGHT, **SPARSE}, {**LIGHT, **SPARSE}, LIGHT, {**LIGHT, **SPARSE}]
    undisturbed = generate(reusing_llada, batch, extras)
    run = getattr(api, kernel)

    def failing(*args, **kwargs):
        layout = next(x for x in args if isinstance(x, BatchLayout))
        if 90 + 32 in layout.host[KEY_LEN]:
            raise RuntimeError("out of registers")
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(api, kernel, failing)
        chosen = choices_by_prompt(reusing_llada, patch)
        got = generate(reusing_llada, batch, extras)
    with monkeypatch.context() as patch:
        usual = choices_by_prompt(reusing_llada, patch)
        assert generate(reusing_llada, batch, extras) == undisturbed
    assert [got[i] for i in (0, 2, 3)] == [undisturbed[i] for i in (0, 2, 3)]
    assert all(chosen[length] == usual[length] for length in (30, 200, 250))


def choices_by_prompt(llm, monkeypatch):
    """Filled as requests run: by length of prompt, the chosen places of each light step."""
    mass, found = state_of(llm).mass, defaultdict(list)
    choose = mass.choose

    def spy(starts, slots, steps, plans, tokens):
        light = choose(starts, slots, steps, plans, tokens)
        for i, (step, plan) in enumerate(zip(steps, plans, strict=True)):
            if step.source is Source.PAGES:
                places = light.places[light.seqs == i]
                found[plan.prompt_len].append(sorted(places[places < step.first_row].tolist()))
        return light

    monkeypatch.setattr(mass, "choose", spy)
    return found


BAD = [
    ({"kv_share": 1.01}, r"kv_share must be a number in \[0, 1\]"),
    ({"kv_share": math.nan}, r"kv_share must be a number in \[0, 1\]"),
    ({"kv_share": "0.1"}, r"kv_share must be"),
    ({"kv_every": 0}, r"kv_every must be an integer of at least 1"),
    ({"kv_refresh": 17}, r"kv_refresh must be an integer in \[1, 16\]"),
    ({"kv_every": 17}, r"kv_every must be an integer in \[1, 16\]"),
    ({"kv_reuse": 2}, r"kv_reuse must be"),
    ({"kv_choice": "rare"}, r"kv_choice must be one of attention, match, both"),
    ({"kv_shares": 0.1}, r"kv_shares must be absent"),
]


@pytest.mark.parametrize(("extra", "message"), BAD, ids=str)
def test_a_request_s_bad_settings_are_refused_by_name(reusing_llada, extra, message):
    with pytest.raises(ValueError, match=message):
        generate(reusing_llada, prompts()[:1], {"steps": 16, **extra})


@pytest.mark.parametrize("extra", [{"kv_reuse": 1}, {"kv_share": 0.1}, {"kv_refresh": 4}], ids=str)
def test_an_engine_without_reuse_refuses_it_and_says_how_to_start_one(llada, extra):
    with pytest.raises(ValueError, match=r'--additional-config \'{"reuse": "selective"}\''):
        generate(llada, prompts()[:1], {"steps": 8, **extra})
    exact = generate(llada, prompts()[:1], {"steps": 8})
    assert generate(llada, prompts()[:1], {"steps": 8, "kv_reuse": 0}) == exact


@pytest.mark.parametrize(
    "reuse", [{"share": 2}, {"every": 0}, {"refresh": 0}, {"keep": 1}, "all", None], ids=str
)
def test_an_engine_refuses_settings_it_does_not_know(llada_path, reuse):
    with pytest.raises(ValueError, match="reuse"):
        start_engine(llada_path, additional_config={"reuse": reuse})


def test_another_backend_refuses_reuse_by_name(llada_path):
    name = "TRITON_ATTN" if torch.cuda.is_available() else "CPU_ATTN"
    with pytest.raises(ValueError, match="--attention-backend sparsed"):
        start_engine(llada_path, attention_backend=name, additional_config={"reuse": "selective"})


@pytest.mark.parametrize("dtype", ["fp8", "float16"])
def test_pages_of_another_type_than_the_model_s_are_refused_by_name(llada_path, dtype):
    with pytest.raises(ValueError, match=f"--kv-cache-dtype {dtype}"):
        start_engine(llada_path, kv_cache_dtype=dtype, additional_config={"reuse": "selective"})
