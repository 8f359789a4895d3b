# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The noise of draws: Philox, exponential and uniform numbers; the kernels against their twins."""

import math

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE

from sparsed_vllm.kernels import api, noise, reference
from sparsed_vllm.kernels.choice import Noise

IMPLEMENTATIONS = [(noise.draw_uniform, DEVICE), (reference.draw_uniform, "cpu")]
both = pytest.mark.parametrize(("draw", "device"), IMPLEMENTATIONS, ids=["kernel", "twin"])
SEEDS = [0, 1 << 31, -1, 3, (1 << 63) - 1, -(1 << 63)]


def rows_of(seeds, places, steps, device="cpu"):
    """Every seed at every place in every step."""
    columns = torch.meshgrid(*map(torch.tensor, (seeds, places, steps)), indexing="ij")
    return Noise(*(x.flatten().to(device) for x in columns))


@triton.jit
def _exponential_kernel(out, seeds, places, steps, SIZE: tl.constexpr):
    row = tl.program_id(0)
    counter = tl.load(places + row), tl.load(steps + row)
    numbers = noise.exponential(tl.load(seeds + row), *counter, tl.arange(0, SIZE // 2))
    tl.store(out + row * SIZE + tl.arange(0, SIZE), numbers)


@triton.jit
def _share_kernel(out, high, low, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    words = tl.load(high + lanes), tl.load(low + lanes)
    tl.store(out + lanes, noise.share(words[0].to(tl.uint32), words[1].to(tl.uint32)))


@triton.jit
def _uniform_kernel(out, high, low, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    words = tl.load(high + lanes), tl.load(low + lanes)
    tl.store(out + lanes, noise.uniform(words[0].to(tl.uint32), words[1].to(tl.uint32)))


def edges():
    """Pairs of words, from the smallest to the largest."""
    words = [0, 1, 2, 255, 1 << 24, (1 << 24) + 1, (1 << 31) + 129, (1 << 32) - 1]
    words = torch.tensor(words)
    return [x.flatten() for x in torch.meshgrid(words, words, indexing="ij")]


def test_exponential_noise_is_the_twin_s():
    given = rows_of(SEEDS, [0, 100_000], [0, 7])
    there = rows_of(SEEDS, [0, 100_000], [0, 7], DEVICE)
    numbers = torch.empty(len(given.seeds), 256, device=DEVICE)
    columns = (there.seeds, there.places, there.steps)
    _exponential_kernel[(len(numbers),)](numbers, *columns, 256)
    expected = reference.exponential(given, 256)
    torch.testing.assert_close(numbers.cpu(), expected, rtol=2e-6, atol=0)


def test_exponential_noise_reaches_far_into_its_tail():
    """Shares below 1, 1e-2 and so on to 1e-6, of eight million, within five deviations."""
    numbers = reference.exponential(rows_of([3], range(8), [0]), 1 << 20)
    assert numbers.min() > 0 and numbers.max() < 17
    for below in (1.0, 1e-2, 1e-4, 1e-6):
        expected = -math.expm1(-below) * numbers.numel()
        assert abs((numbers < below).sum() - expected) < 5 * expected**0.5


def test_random_bits_are_the_twin_s_floats_to_the_bit():
    """From the smallest to one, which does not fit below 2**32 in a float."""
    high, low = edges()
    shares = torch.empty(64, device=DEVICE)
    _share_kernel[(1,)](shares, high.to(DEVICE), low.to(DEVICE), 64)
    expected = reference.share(high, low)
    assert torch.equal(shares.cpu(), expected)
    assert expected.min() == 2**-65 and expected.max() == 1
    exact = (high.double() * 2**32 + low.double() + 0.5) * 2**-64
    torch.testing.assert_close(
        expected.double()[exact > 2**-41], exact[exact > 2**-41], rtol=2**-23, atol=0
    )


def test_random_bits_are_the_twin_s_doubles_to_the_bit():
    """In (0, 1): the largest is cut off below one, the smallest is 2**-65."""
    high, low = edges()
    numbers = torch.empty(64, dtype=torch.float64, device=DEVICE)
    _uniform_kernel[(1,)](numbers, high.to(DEVICE), low.to(DEVICE), 64)
    expected = reference.uniform(high, low)
    assert torch.equal(numbers.cpu(), expected)
    assert expected.min() == 2**-65 and expected.max() == 1 - 2**-53
    exact = [(a << 32) + b + 0.5 for a, b in zip(high.tolist(), low.tolist(), strict=True)]
    below_one = torch.tensor(exact, dtype=torch.float64).mul(2**-64).clamp(max=1 - 2**-53)
    torch.testing.assert_close(expected, below_one, rtol=2**-52, atol=0)


@both
def test_uniform_numbers_depend_on_the_row_s_noise_alone(draw, device):
    given = rows_of(SEEDS, [0, 1, 4095], [0, 1, 130], device)
    numbers = draw(given)
    assert numbers.dtype == torch.float64 and len(numbers.unique()) == len(numbers)
    assert torch.equal(
        numbers.cpu(), reference.draw_uniform(rows_of(SEEDS, [0, 1, 4095], [0, 1, 130]))
    )
    rows = torch.tensor([5, 50, 5, 0], device=device)
    part = draw(Noise(given.seeds[rows], given.places[rows], given.steps[rows]))
    assert torch.equal(part, numbers[rows])


@both
def test_uniform_numbers_are_uniform(draw, device):
    """Tenths of 20000 numbers: one seed in a million has chi-squared, nine degrees, over 46."""
    numbers = draw(rows_of([8], range(20_000), [0], device))
    assert numbers.min() > 0 and numbers.max() < 1
    counts = (numbers * 10).long().bincount(minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 46


@both
def test_no_rows_are_no_work(draw, device):
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    assert draw(Noise(nothing, nothing, nothing)).shape == (0,)


def test_a_row_s_uniform_number_is_none_of_its_tokens_noise():
    """They come from counters of their own: -log(1 - v) of one is not the other."""
    given = rows_of([5], [2], [1])
    tokens = reference.exponential(given, 2).double()
    assert ((-(-api.draw_uniform(given)).log1p() - tokens).abs() > 1e-3).all()


def test_the_generator_is_philox():
    """Words that its authors publish, of Random123's kat_vectors."""
    key = (torch.tensor(0xA4093822), torch.tensor(0x299F31D0))
    digits = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    words = reference._philox(tuple(torch.tensor([x]) for x in digits), key)
    expected = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert [int(word) for word in words] == expected
