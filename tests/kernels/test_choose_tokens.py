# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Logits -> tokens and confidences: the kernel and its twin, against float64."""

import math

import pytest
import torch
from kernel_cases import DEVICE, assert_within_rounding

from sparsed_vllm.kernels import choose_tokens as kernel
from sparsed_vllm.kernels import reference
from sparsed_vllm.kernels.choice import Choice, Forbidden, Noise

MASK = 7
CONFIDENCES = ["probability", "margin", "entropy"]
IMPLEMENTATIONS = [(kernel.choose_tokens, DEVICE), (reference.choose_tokens, "cpu")]
both = pytest.mark.parametrize(("choose", "device"), IMPLEMENTATIONS, ids=["kernel", "twin"])
DRAWN = [{}, {"tempered": True}, {"tempered": True, "top_p": 0.6}, {"tempered": True, "top_k": 5}]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several of them in a small vocabulary."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernel, "TILE", 128)
        monkeypatch.setattr(kernel, "ROW_TILE", 256)


def random_logits(rows=8, vocab=300, dtype=torch.float32):
    return (torch.randn(rows, vocab) * 3).to(dtype)


def noise_of(rows, seed=(5 << 32) + 3_000_000_000):
    """Of one request's places, from 0 on."""
    places = torch.arange(rows)
    return Noise(torch.full_like(places, seed), places, torch.full_like(places, 3))


def early_in(rows):
    """Every other row must not stop."""
    return Forbidden(MASK, torch.tensor([3, 5, 299]), torch.arange(rows) % 2 == 0)


def run(logits, choice, forbidden=None, choose=kernel.choose_tokens, device=DEVICE, noise=None):
    """noise: by default the same in every call"""
    forbidden = forbidden or Forbidden(MASK)
    if forbidden.early is not None:
        barred = (x.to(device) for x in (forbidden.stop_tokens, forbidden.early))
        forbidden = Forbidden(forbidden.mask_token_id, *barred)
    if choice.temperature > 0:
        noise = on(device, noise or noise_of(len(logits)))
    return [x.cpu() for x in choose(logits.to(device), choice, forbidden, noise)]


def on(device, noise):
    return Noise(*(x.to(device) for x in (noise.seeds, noise.places, noise.steps)))


def exact_confidence(logits, tokens, choice, forbidden):
    """In float64, from the definitions; top p by a loop over the tokens."""
    wide = logits.double()
    if choice.tempered:
        wide = forbidden.bar_from(wide.clone()) / choice.temperature
        for row in wide:
            order = row.argsort(descending=True)
            probs = row.softmax(-1)[order]
            kept = (probs.cumsum(-1) - probs <= choice.top_p).sum()
            row[order[min(kept, choice.top_k or kept) :]] = -torch.inf
    probs = wide.softmax(-1)
    if choice.confidence == "margin":
        return probs.topk(2).values @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    if choice.confidence == "entropy":
        return -torch.special.entr(probs).sum(-1)
    return probs.gather(-1, tokens[:, None]).squeeze(-1)


def check(logits, choice, forbidden=None, **options):
    """Tokens like the twin's, which it returns, confidences within rounding, and largest logits."""
    forbidden = forbidden or Forbidden(MASK)
    tokens, confidence, largest = run(logits, choice, forbidden, **options)
    twin = run(logits, choice, forbidden, reference.choose_tokens, "cpu")
    assert torch.equal(tokens, twin[0])
    exact = exact_confidence(logits, tokens, choice, forbidden)
    assert_within_rounding(confidence, exact, twin[1])
    assert torch.equal(largest, logits.amax(-1).float())
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("vocab", [300, 129, 8])
def test_the_likeliest_token_is_chosen(vocab, confidence, dtype):
    check(random_logits(vocab=vocab, dtype=dtype), Choice(confidence=confidence))


@pytest.mark.parametrize(
    ("dtype", "confidence"),
    list(zip((torch.float32, torch.bfloat16, torch.float16), CONFIDENCES, strict=True)),
)
@pytest.mark.parametrize("rest", DRAWN, ids=str)
def test_tokens_are_drawn_as_the_twin_draws_them(rest, confidence, dtype):
    choice = Choice(0.8, confidence=confidence, **rest)
    check(random_logits(dtype=dtype), choice)


@pytest.mark.parametrize("choice", [{}, *({"temperature": 2.0, **rest} for rest in DRAWN)], ids=str)
def test_stop_tokens_are_barred_from_early_rows(choice):
    logits, forbidden = random_logits(), early_in(8)
    logits[:, forbidden.stop_tokens] += 10
    tokens = check(logits, Choice(**choice), forbidden)
    assert not torch.isin(tokens[forbidden.early], forbidden.stop_tokens).any()


@both
def test_the_mask_token_counts_in_the_softmax_of_the_logits_as_they_are(choose, device):
    logits = random_logits()
    logits[:, MASK] = 30
    tokens, confidence, largest = run(logits, Choice(), None, choose, device)
    assert (tokens != MASK).all() and (confidence < 0.5).all() and (largest == 30).all()
    assert (run(logits, Choice(confidence="margin"), None, choose, device)[1] > 0.1).any()


@both
def test_of_equal_logits_the_first_is_chosen(choose, device):
    logits = torch.zeros(3, 300)
    logits[1, [170, 70, 299]] = 4.0
    logits[2] = -torch.inf
    tokens, _, _ = run(logits, Choice(), Forbidden(0), choose, device)
    assert tokens.tolist() == [1, 70, 0]


@both
@pytest.mark.parametrize(
    "rest", [{"top_k": 3}, {"top_p": 0.6}, {"top_p": 0.9, "top_k": 3}], ids=str
)
def test_tokens_that_tie_at_the_edge_are_kept_together(rest, choose, device):
    logits = torch.full((48, 20), -9.0, dtype=torch.bfloat16)
    logits[:, :2], logits[:, 2:6] = 2.0, 1.0  # the two have 0.58 of the mass
    logits[:, MASK] = 50
    choice = Choice(1.0, tempered=True, **rest)
    tokens, confidence, _ = run(logits, choice, None, choose, device)
    kept = {0, 1, 2, 3, 4, 5}
    assert set(tokens.tolist()) == kept
    mass = 2 * math.exp(2) + 4 * math.exp(1)
    expected = torch.where(tokens < 2, math.exp(2), math.e) / mass
    torch.testing.assert_close(confidence, expected, rtol=1e-5, atol=0)


@both
def test_zeros_of_both_signs_tie(choose, device):
    logits = torch.full((40, 20), -9.0, dtype=torch.bfloat16)
    logits[:, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    choice = Choice(1.0, tempered=True, top_k=1)
    assert set(run(logits, choice, None, choose, device)[0].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("top_p", "top_k"), [(1e-6, 0), (0.3, 20), (0.999, 0), (1.0, 1), (0.999, 1000)]
)
def test_what_is_cut_off_is_found_to_the_last_bit(top_p, top_k, dtype):
    logits = random_logits(2, 200, dtype) - 4
    logits[1, ::3] = -torch.inf
    check(logits, Choice(1.5, tempered=True, top_p=top_p, top_k=top_k))


@both
@pytest.mark.parametrize(
    "choice", [{}, {"temperature": 1.0, "tempered": True, "top_p": 0.5}], ids=str
)
def test_logits_that_are_not_numbers_are_told_by_the_largest(choice, choose, device):
    logits = random_logits(5)
    logits[0, 70], logits[1, 299], logits[2, MASK] = torch.nan, torch.inf, torch.nan
    logits[3] = -torch.inf
    for confidence in CONFIDENCES:
        asked = Choice(confidence=confidence, **choice)
        tokens, _, largest = run(logits, asked, None, choose, device)
        assert largest.isfinite().tolist() == [False, False, False, False, True]
        assert (tokens >= 0).all() and (tokens < 300).all()


@both
def test_no_rows_are_no_work(choose, device):
    sizes = [len(x) for x in run(torch.empty(0, 300), Choice(1.0), None, choose, device)]
    assert sizes == [0, 0, 0]


@pytest.mark.parametrize(
    "choice", [{}, {"temperature": 1.0, "tempered": True, "top_p": 0.5}], ids=str
)
def test_rows_may_lie_apart(choice):
    wide = random_logits(8, 340).to(DEVICE)
    apart, whole = wide[::2, 11:311], wide[::2, 11:311].contiguous()
    for a, b in zip(run(apart, Choice(**choice)), run(whole, Choice(**choice)), strict=True):
        assert torch.equal(a, b)


SEEDS = [0, 1, 1 << 32, -1, 1 << 31, (1 << 63) - 1]
EVERY_KIND = [
    *({"confidence": confidence} for confidence in CONFIDENCES),
    *({"temperature": 1.0, "confidence": confidence} for confidence in CONFIDENCES),
    {"temperature": 1.0, "tempered": True, "top_p": 0.6, "confidence": "entropy"},
    {"temperature": 1.0, "tempered": True, "top_k": 5, "confidence": "margin"},
]


@pytest.fixture
def two_threads():
    """Which torch shares out a sum between, if it is large enough."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@both
@pytest.mark.parametrize("choice", EVERY_KIND, ids=str)
@pytest.mark.parametrize("vocab", [301, 16_383, 40_001])
def test_a_row_depends_on_its_own_logits_and_noise_alone(
    vocab, choice, choose, device, two_threads
):
    """To the bit: beside other rows, in other places, and alone."""
    if vocab > 301 and device == DEVICE == "cpu" and choose is kernel.choose_tokens:
        pytest.skip("minutes in the interpreter")
    logits, choice = random_logits(4, vocab), Choice(**choice)
    noise = Noise(torch.randint(1 << 62, (4,)), torch.arange(4), torch.arange(4) % 2)
    whole = run(logits, choice, early_of(4), choose, device, noise)
    for rows in ([3], [2, 0, 0]):
        own = Noise(noise.seeds[rows], noise.places[rows], noise.steps[rows])
        part = run(logits[rows], choice, early_of(4, rows), choose, device, own)
        for mine, theirs in zip(part, whole, strict=True):
            assert torch.equal(mine, theirs[rows])


def early_of(rows, some=slice(None)):
    every = early_in(rows)
    return Forbidden(every.mask_token_id, every.stop_tokens, every.early[some])


@both
def test_each_seed_place_and_step_draws_anew(choose, device):
    logits = random_logits(1).expand(6, -1)
    same, rising = torch.full((6,), 4), torch.arange(6)
    for noise in (
        Noise(torch.tensor(SEEDS), same, same),
        Noise(same, rising, same),
        Noise(same, same, rising),
    ):
        flat = torch.zeros(6, 300)
        tokens = run(flat, Choice(1.0), None, choose, device, noise)[0]
        assert len(set(tokens.tolist())) == 6
        again = run(logits, Choice(1.0), None, choose, device, noise)[0]
        assert torch.equal(again, run(logits, Choice(1.0), None, choose, device, noise)[0])


@pytest.mark.parametrize(
    ("choose", "device"),
    [pytest.param(*IMPLEMENTATIONS[0], marks=pytest.mark.gpu), IMPLEMENTATIONS[1]],
    ids=["kernel", "twin"],
)
@pytest.mark.parametrize("rest", [{}, {"tempered": True, "top_k": 4}], ids=str)
def test_tokens_are_drawn_with_their_probability(rest, choose, device):
    """Chi-squared, five degrees of freedom: one seed in a million has more than 36."""
    rows, temperature = 4000, 0.7
    logits = torch.tensor([[1.0, 0.2, -0.5, 0.7, -1.0, 9.0, 0.0]], dtype=torch.bfloat16)
    choice, noise = Choice(temperature, **rest), noise_of(rows, 11)
    tokens = run(logits.expand(rows, -1), choice, Forbidden(5), choose, device, noise)[0]
    allowed = Forbidden(5).bar_from(logits.clone())
    if choice.top_k:
        allowed[allowed < allowed.topk(choice.top_k).values[:, -1:]] = -torch.inf
    expected = rows * (allowed[0].double() / temperature).softmax(-1)
    drawn = tokens.bincount(minlength=7)
    possible = expected > 0
    assert not drawn[~possible].any()
    assert ((drawn - expected)[possible] ** 2 / expected[possible]).sum() < 36


@pytest.mark.gpu
def test_the_numbers_of_logits_outgrow_int32():
    vocab, rows = 1 << 17, (1 << 14) + 3
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[:, 70_000] = 20
    logits[-1] = 0
    logits[-1, 100_001] = 20
    for choice in (Choice(), Choice(1.0, tempered=True, top_p=0.5)):
        noise = on("cuda", noise_of(rows)) if choice.temperature else None
        tokens, _, largest = kernel.choose_tokens(logits, choice, Forbidden(MASK), noise)
        assert (tokens[:-1] == 70_000).all() and tokens[-1] == 100_001 and (largest == 20).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [126_464, 152_064])
@pytest.mark.parametrize("choice", [{}, *({"temperature": 0.9, **rest} for rest in DRAWN)], ids=str)
def test_whole_vocabularies_are_chosen_from(choice, vocab, dtype):
    for confidence in CONFIDENCES:
        check(random_logits(vocab=vocab, dtype=dtype), Choice(confidence=confidence, **choice))
