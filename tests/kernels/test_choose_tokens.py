# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Logits -> tokens and confidences: the kernel and its twin, against float64."""

import math

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, assert_within_rounding

from sparsed_vllm.kernels import choose_tokens as kernel
from sparsed_vllm.kernels import reference
from sparsed_vllm.kernels.choice import Choice, Forbidden

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


def early_in(rows):
    """Every other row must not stop."""
    return Forbidden(MASK, torch.tensor([3, 5, 299]), torch.arange(rows) % 2 == 0)


def run(logits, choice, forbidden=None, choose=kernel.choose_tokens, device=DEVICE):
    forbidden = forbidden or Forbidden(MASK)
    if forbidden.early is not None:
        barred = (x.to(device) for x in (forbidden.stop_tokens, forbidden.early))
        forbidden = Forbidden(forbidden.mask_token_id, *barred)
    return [x.cpu() for x in choose(logits.to(device), choice, forbidden)]


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
    """Tokens like the twin's, confidences within rounding, and the largest logits."""
    forbidden = forbidden or Forbidden(MASK)
    tokens, confidence, largest = run(logits, choice, forbidden, **options)
    twin = run(logits, choice, forbidden, reference.choose_tokens, "cpu")
    assert torch.equal(tokens, twin[0])
    exact = exact_confidence(logits, tokens, choice, forbidden)
    assert_within_rounding(confidence, exact, twin[1])
    assert torch.equal(largest, logits.amax(-1).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("vocab", [300, 129, 8])
def test_the_likeliest_token_is_chosen(vocab, confidence, dtype):
    check(random_logits(vocab=vocab, dtype=dtype), Choice(confidence=confidence))


@pytest.mark.parametrize(
    ("dtype", "confidence"),
    zip((torch.float32, torch.bfloat16, torch.float16), CONFIDENCES, strict=True),
)
@pytest.mark.parametrize("rest", DRAWN, ids=str)
def test_tokens_are_drawn_as_the_twin_draws_them(rest, confidence, dtype):
    choice = Choice(0.8, seed=(5 << 32) + 3_000_000_000, confidence=confidence, **rest)
    check(random_logits(dtype=dtype), choice)


@pytest.mark.parametrize("choice", [{}, *({"temperature": 2.0, **rest} for rest in DRAWN)], ids=str)
def test_stop_tokens_are_barred_from_early_rows(choice):
    logits, forbidden = random_logits(), early_in(8)
    logits[:, forbidden.stop_tokens] += 10
    check(logits, Choice(**choice), forbidden)
    tokens = run(logits, Choice(**choice), forbidden)[0]
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
    choice = Choice(1.0, 1, tempered=True, **rest)
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
    choice = Choice(1.0, 1, tempered=True, top_k=1)
    assert set(run(logits, choice, None, choose, device)[0].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("top_p", "top_k"), [(1e-6, 0), (0.3, 20), (0.999, 0), (1.0, 1), (0.999, 1000)]
)
def test_what_is_cut_off_is_found_to_the_last_bit(top_p, top_k, dtype):
    logits = random_logits(2, 200, dtype) - 4
    logits[1, ::3] = -torch.inf
    check(logits, Choice(1.5, 9, tempered=True, top_p=top_p, top_k=top_k))


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


@both
def test_a_row_draws_alike_whoever_follows(choose, device):
    logits = random_logits(6)
    whole, part = (run(x, Choice(1.0, 4), None, choose, device)[0] for x in (logits, logits[:3]))
    assert torch.equal(whole[:3], part)
    others = (
        run(logits, Choice(1.0, seed), None, choose, device)[0] for seed in (5, 4 + (1 << 32))
    )
    assert all(not torch.equal(whole, other) for other in others)


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
    choice = Choice(temperature, 11, **rest)
    tokens = run(logits.expand(rows, -1), choice, Forbidden(5), choose, device)[0]
    allowed = Forbidden(5).bar_from(logits.clone())
    if choice.top_k:
        allowed[allowed < allowed.topk(choice.top_k).values[:, -1:]] = -torch.inf
    expected = rows * (allowed[0].double() / temperature).softmax(-1)
    drawn = tokens.bincount(minlength=7)
    possible = expected > 0
    assert not drawn[~possible].any()
    assert ((drawn - expected)[possible] ** 2 / expected[possible]).sum() < 36


@triton.jit
def _noise_kernel(out, seed, row, SIZE: tl.constexpr):
    noise = kernel.exponential(seed, row, tl.arange(0, SIZE // 2))
    tl.store(out + tl.arange(0, SIZE), noise)


@triton.jit
def _share_kernel(out, high, low, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    words = tl.load(high + lanes), tl.load(low + lanes)
    tl.store(out + lanes, kernel.share(words[0].to(tl.uint32), words[1].to(tl.uint32)))


@pytest.mark.parametrize("seed", [0, 1 << 31, (1 << 64) - 1])
@pytest.mark.parametrize("row", [0, 100_000])
def test_the_noise_is_the_twin_s(row, seed):
    noise = torch.empty(256, device=DEVICE)
    signed = seed - (seed >> 63 << 64)
    _noise_kernel[(1,)](noise, signed, row, 256)
    expected = reference.exponential(seed, range(row, row + 1), 256, torch.device("cpu"))[0]
    torch.testing.assert_close(noise.cpu(), expected, rtol=2e-6, atol=0)


def test_random_bits_are_the_twin_s_numbers_to_the_bit():
    """From the smallest to one, which does not fit below 2**32 in a float."""
    edges = torch.tensor([0, 1, 2, 255, 1 << 24, (1 << 24) + 1, (1 << 31) + 129, (1 << 32) - 1])
    high, low = (x.flatten() for x in torch.meshgrid(edges, edges, indexing="ij"))
    shares = torch.empty(64, device=DEVICE)
    _share_kernel[(1,)](shares, high.to(DEVICE), low.to(DEVICE), 64)
    expected = reference.share(high, low)
    assert torch.equal(shares.cpu(), expected)
    assert expected.min() == 2**-65 and expected.max() == 1
    exact = (high.double() * 2**32 + low.double() + 0.5) * 2**-64
    torch.testing.assert_close(
        expected.double()[exact > 2**-41], exact[exact > 2**-41], rtol=2**-23, atol=0
    )


def test_noise_is_exponential_far_into_its_tail():
    """Shares below 1, 1e-2 and so on to 1e-6, of eight million, within five deviations."""
    noise = reference.exponential(3, range(8), 1 << 20, torch.device("cpu"))
    assert noise.min() > 0 and noise.max() < 17
    for below in (1.0, 1e-2, 1e-4, 1e-6):
        expected = -math.expm1(-below) * noise.numel()
        assert abs((noise < below).sum() - expected) < 5 * expected**0.5


def test_the_generator_is_philox():
    """Words that its authors publish, of Random123's kat_vectors."""
    key = (0xA4093822, 0x299F31D0)
    digits = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    words = reference._philox(tuple(torch.tensor([x]) for x in digits), key)
    expected = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert [int(word) for word in words] == expected


@pytest.mark.gpu
def test_the_numbers_of_logits_outgrow_int32():
    vocab, rows = 1 << 17, (1 << 14) + 3
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[:, 70_000] = 20
    logits[-1] = 0
    logits[-1, 100_001] = 20
    for choice in (Choice(), Choice(1.0, tempered=True, top_p=0.5)):
        tokens, _, largest = kernel.choose_tokens(logits, choice, Forbidden(MASK))
        assert (tokens[:-1] == 70_000).all() and tokens[-1] == 100_001 and (largest == 20).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [126_464, 152_064])
@pytest.mark.parametrize("choice", [{}, *({"temperature": 0.9, **rest} for rest in DRAWN)], ids=str)
def test_whole_vocabularies_are_chosen_from(choice, vocab, dtype):
    for confidence in CONFIDENCES:
        check(random_logits(vocab=vocab, dtype=dtype), Choice(confidence=confidence, **choice))
