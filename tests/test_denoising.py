# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""One request's denoising on a plain network: plan, canvas and sampler without the engine."""

import contextlib

import oracle
import pytest
import torch
from checkpoints import DREAM_MASK_ID, LLADA_MASK_ID
from loops import Loop
from torch.utils._python_dispatch import TorchDispatchMode

from sparsed_vllm.config import Sparsity
from sparsed_vllm.families import DREAM, LLADA
from sparsed_vllm.params import parse_params

PROMPT = [104, 101, 108, 108, 111]


@pytest.fixture(scope="session")
def networks(llada_path, dream_path):
    return {LLADA: oracle.load_llada(llada_path), DREAM: oracle.load_dream(dream_path)}


def named(given):
    """A test's name for one of its parameters."""
    return getattr(given, "name", str(given))


def open_request(
    family,
    *,
    num_tokens=24,
    final=(),
    seed=0,
    temperature=0.0,
    device="cpu",
    sparsity=None,
    **extra,
):
    mask = LLADA_MASK_ID if family is LLADA else DREAM_MASK_ID
    params = parse_params(
        family,
        max_tokens=num_tokens,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        ignore_eos=False,
        extra_args=extra,
    )
    return Loop(params, sparsity=sparsity, final=final, mask=mask, seed=seed, device=device)


class NobodyAsks(TorchDispatchMode):
    """Fails on what would have the host wait for a device: a result's value, or its size."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        assert function not in (
            aten._local_scalar_dense.default,
            aten.nonzero.default,
            aten.masked_select.default,
        ), function
        if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
            assert not masks, f"{function} by a mask"
        return function(*args, **(kwargs or {}))


def take_step(loop, network, shift):
    """One step on `network`; returns the tokens that became final."""
    ids = torch.cat([torch.tensor(PROMPT), loop.tokens])
    places = loop.open()
    logits = network(ids[None])[0][len(PROMPT) - shift + places.clamp(min=0)]
    tokens, count = loop.advance(logits)
    return tokens[:count].tolist()


def run(family, networks, **request):
    """All steps of a request; returns the chunks of tokens it handed out."""
    denoising = open_request(family, **request)
    chunks = []
    while not denoising.is_over:
        chunks.append(take_step(denoising, networks[family], family.shifts_logits))
    return chunks


def flat(chunks):
    return [token for chunk in chunks for token in chunk]


def test_a_block_is_handed_out_at_its_last_step(networks):
    chunks = run(LLADA, networks, steps=6, block_length=8)
    assert [len(chunk) for chunk in chunks] == [0, 8, 0, 8, 0, 8]


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        (LLADA, {"steps": 6, "block_length": 8}),
        (LLADA, {"steps": 24, "block_length": 7}),
        (LLADA, {"threshold": 0.05, "block_length": 7}),
        (DREAM, {"threshold": 0.05, "block_length": 8}),
        (DREAM, {"alg": "origin", "block_length": 4}),
        (DREAM, {"alg": "entropy", "steps": 7, "block_length": 5}),
    ],
    ids=named,
)
@pytest.mark.parametrize("num_final", [0, 16])
def test_open_places_lie_where_the_host_expects_them(networks, family, extra, num_final):
    if num_final % extra["block_length"]:
        num_final = 0
    denoising = open_request(family, final=[5] * num_final, **extra)
    while not denoising.is_over:
        places = denoising.open().tolist()
        (step,) = denoising.batch.steps
        assert {place for place in places if place >= 0} <= set(range(step.block.start, step.end))
        take_step(denoising, networks[family], family.shifts_logits)


ASKING = [
    (LLADA, {"steps": 6, "block_length": 8}),
    (LLADA, {"remasking": "random", "temperature": 0.5}),
    (LLADA, {"threshold": 0.05, "block_length": 8}),
    (DREAM, {"alg": "origin", "temperature": 0.5}),
    (DREAM, {"alg": "topk_margin", "alg_temp": 0.5}),
    (DREAM, {"alg": "entropy", "steps": 7}),
]


@pytest.mark.parametrize(("family", "extra"), ASKING, ids=named)
def test_no_step_asks_what_the_device_has_found(family, extra):
    run_on_noise(family, extra, "cpu", NobodyAsks())


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "extra"), ASKING, ids=named)
def test_no_request_waits_for_the_device(family, extra):
    run_on_noise(family, extra, "cuda", contextlib.nullcontext())  # compiles what it needs
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_on_noise(family, extra, "cuda", contextlib.nullcontext())
    finally:
        torch.cuda.set_sync_debug_mode(before)


def run_on_noise(family, extra, device, mode):
    """All steps, inside `mode`, of a request that resumes after its first block."""
    final = [5] * extra.get("block_length", 0)
    denoising = open_request(family, final=final, device=device, **extra)
    with mode:
        while not denoising.is_over:
            places = denoising.open()
            denoising.advance(torch.randn(len(places), 320, device=device))


@pytest.mark.parametrize("block_length", [4, 12])
@pytest.mark.parametrize("seed", range(8))
def test_a_block_that_is_drawn_before_its_last_step_waits_for_it(networks, block_length, seed):
    chunks = run(DREAM, networks, alg="origin", block_length=block_length, seed=seed)
    expected = [0] * 24
    expected[block_length - 1 :: block_length] = [block_length] * (24 // block_length)
    assert [len(chunk) for chunk in chunks] == expected


def test_without_early_stop_all_is_handed_out_at_the_end(networks):
    whole = run(LLADA, networks, steps=6, block_length=8, early_stop=0)
    assert [len(chunk) for chunk in whole] == [0, 0, 0, 0, 0, 24]
    assert flat(whole) == flat(run(LLADA, networks, steps=6, block_length=8))


def test_a_threshold_hands_out_blocks_as_they_fill(networks):
    chunks = run(LLADA, networks, threshold=0.05, block_length=8)
    expected = oracle.llada_generate(
        networks[LLADA],
        PROMPT,
        steps=24,
        gen_length=24,
        block_length=8,
        threshold=0.05,
        mask_id=LLADA_MASK_ID,
    )
    assert flat(chunks) == expected.ids
    assert len([chunk for chunk in chunks if chunk]) == 3


@pytest.mark.parametrize("nats", [0.0, 4.0, 4.8])
@pytest.mark.parametrize("family", [LLADA, DREAM], ids=named)
def test_a_threshold_may_be_an_entropy(networks, family, nats):
    sizes = {"steps": 24, "block_length": 8, "entropy_threshold": nats}
    if family is LLADA:
        sizes |= {"gen_length": 24, "mask_id": LLADA_MASK_ID}
        expected = oracle.llada_generate(networks[LLADA], PROMPT, **sizes)
    else:
        sizes |= {"max_new_tokens": 24, "alg": "entropy", "mask_id": DREAM_MASK_ID}
        expected = oracle.dream_generate(networks[DREAM], PROMPT, **sizes)
    assert not expected.met_a_tie()
    chunks = run(family, networks, entropy_threshold=nats, block_length=8)
    assert flat(chunks) == expected.ids
    assert len([chunk for chunk in chunks if chunk]) == 3
    assert (expected.forwards == 24) == (nats == 0)


@pytest.mark.parametrize("final", [0, 16])
@pytest.mark.parametrize(("family", "extra"), [(LLADA, {}), (DREAM, {"alg": "entropy"})], ids=named)
def test_a_canvas_of_variable_length_grows_block_by_block(networks, family, extra, final):
    def generate(prompt, length, steps):
        if family is LLADA:
            sizes = {"gen_length": length, "block_length": length, "mask_id": LLADA_MASK_ID}
            return oracle.llada_generate(networks[LLADA], prompt, steps=steps, **sizes)
        sizes = {"max_new_tokens": length, "mask_id": DREAM_MASK_ID}
        return oracle.dream_generate(networks[DREAM], prompt, steps=steps, **sizes, **extra)

    expected = oracle.var_generate(generate, PROMPT, gen_length=24, block_length=8, steps=4)
    assert not expected.met_a_tie()
    request = {"steps": 12, "block_length": 8, "variable_length": 1, **extra}
    chunks = run(family, networks, final=expected.ids[:final], **request)
    assert expected.ids[:final] + flat(chunks) == expected.ids
    assert flat(run(family, networks, **{**request, "variable_length": 0})) != expected.ids


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        (LLADA, {"steps": 12, "temperature": 0.9}),
        (LLADA, {"steps": 12, "remasking": "random"}),
        (DREAM, {"steps": 12, "alg": "origin"}),
        (DREAM, {"steps": 12, "alg": "entropy", "alg_temp": 0.5, "temperature": 0.4}),
    ],
)
def test_a_seed_repeats_the_request(networks, family, extra):
    first, again, other = (flat(run(family, networks, seed=seed, **extra)) for seed in (1, 1, 2))
    assert len(first) == 24
    assert first == again
    assert first != other


RESUMED = [
    (LLADA, {"steps": 12}),
    (LLADA, {"threshold": 0.01}),
    (LLADA, {"steps": 12, "remasking": "random"}),
    (DREAM, {"steps": 12, "alg": "origin"}),
    (DREAM, {"steps": 12, "alg": "entropy", "alg_temp": 0.5}),
]


@pytest.mark.parametrize(("family", "extra"), RESUMED, ids=named)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("resume_after", [8, 16])
def test_a_resumed_request_ends_as_if_never_preempted(
    networks, family, extra, temperature, resume_after
):
    request = {"block_length": 8, "temperature": temperature, "seed": 5, **extra}
    whole = flat(run(family, networks, **request))
    rest = run(family, networks, final=whole[:resume_after], **request)
    assert whole[:resume_after] + flat(rest) == whole


def test_a_request_that_starts_over_keeps_what_it_handed_out(networks):
    """As where rounding (bf16) chooses another token the second time."""
    request = {"steps": 12, "block_length": 8, "sparsity": Sparsity(0.2, 0.3, 16)}
    whole = flat(run(LLADA, networks, **request))
    handed_out = [5, 6, 7, 8, 9, 10, 11, 12]
    assert handed_out != whole[:8]
    loop = open_request(LLADA, final=handed_out, **request)
    assert loop.tokens.eq(LLADA_MASK_ID).all()
    chunks = []
    while not loop.is_over:
        chunks.append(take_step(loop, networks[LLADA], shift=False))
    assert [len(chunk) for chunk in chunks] == [0] * 7 + [8] + [0] * 3 + [8]
    assert loop.tokens.tolist() == handed_out + flat(chunks)


def test_logits_are_asked_for_open_places_only(networks):
    denoising = open_request(LLADA, steps=12, block_length=8)
    asked = []
    while not denoising.is_over:
        asked.append(len(denoising.open()))
        take_step(denoising, networks[LLADA], shift=False)
    assert asked == [8, 6, 4, 2] * 3


def test_a_step_that_fills_nothing_asks_for_nothing(networks):
    denoising = open_request(LLADA, num_tokens=4, steps=16)
    for _ in range(4):
        take_step(denoising, networks[LLADA], shift=False)
    assert not denoising.canvases.masked.any()
    assert len(denoising.open()) == 0


def test_a_step_beyond_the_last_changes_nothing(networks):
    denoising = open_request(LLADA, num_tokens=4, threshold=1e-9)
    assert len(take_step(denoising, networks[LLADA], shift=False)) == 4
    before = denoising.tokens
    assert take_step(denoising, networks[LLADA], shift=False) == []
    assert torch.equal(denoising.tokens, before)


def test_logits_that_are_not_numbers_still_end_the_request():
    denoising = open_request(LLADA, num_tokens=4, threshold=0.5)
    handed_out = []
    while not denoising.is_over:
        places = denoising.open()
        tokens, count = denoising.advance(torch.full((len(places), 320), torch.nan))
        handed_out += tokens[:count].tolist()
    assert len(handed_out) == 4
    assert denoising.canvases.has_failed.tolist() == [False, True, False]
