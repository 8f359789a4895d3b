# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Softmax mass per token, of keys in pages: the kernel and its twin against float64."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import BLOCK_SIZES, DEVICE, HEAD_DIMS, NAN
from paged_cases import logits_of, make_case
from torch import Tensor

from sparsed_vllm.kernels import api, reference
from sparsed_vllm.kernels.token_mass import token_mass

IMPLEMENTATIONS = {"kernel": (token_mass, DEVICE), "twin": (reference.token_mass, "cpu")}

RAGGED = [(1, 1), (127, 3), (128, 16), (129, 65), (300, 40)]
"""(tokens, rows) of sequences around the boundaries of pages and of tiles."""


def run(case, add=token_mass, device=DEVICE):
    """What `mass` holds afterwards, on the CPU."""
    arguments = case.on(device)
    add(**arguments)
    return arguments["mass"].cpu()


def exact_mass(case):
    """In float64; and bool of the same shape, which places belong to tokens."""
    mass, inside = case.mass.double(), torch.zeros_like(case.mass, dtype=torch.bool)
    for place, sequence in case.layout.sequences():
        weights = case.weights[sequence.queries].double()
        counts = weights > 0
        lse = case.lse[:, sequence.queries].double()[:, :, None]
        shares = (logits_of(case, sequence) - lse).exp()[:, counts]
        own = int(case.slots[place]), slice(0, sequence.key_len)
        mass[own] += torch.einsum("hqk,q->k", shares, weights[counts])
        inside[own] = True
    return mass, inside


def check(case):
    exact, inside = exact_mass(case)
    actual, twin = run(case), run(case, reference.token_mass, "cpu")
    for mass in (actual, twin):
        assert torch.equal(mass[~inside], case.mass[~inside])
    error, twin_error = ((x.double() - exact)[inside].abs().max() for x in (actual, twin))
    relative = torch.finfo(torch.float32).eps + gpu_error(case)
    allowed = 2 * twin_error + relative * exact[inside].abs().max()
    assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.2e}"


def gpu_error(case):
    """How far off a share of a row's mass may be on a GPU, relative to it, beside rounding.

    The special function unit errs by two of the last bits of exp2, and tensor cores cut each sum of
    16 products off at a float's 23 bits. Both errors have one sign, which no sum averages out.
    """
    if DEVICE == "cpu":
        return 0.0
    sums = 0 if case.q.dtype == torch.float32 else 1 + case.q.shape[2] / 16
    logits = [logits_of(case, sequence).nan_to_num() for _, sequence in case.layout.sequences()]
    return 2**-22 * (1 + sums * max(float(x.abs().max()) for x in logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", [16, 128])
def test_a_ragged_batch_equals_float64_within_rounding(tile, dtype):
    check(make_case(RAGGED, dtype=dtype, tile=tile))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_head_size_equals_float64_within_rounding(dtype, head_dim):
    check(make_case([(140, 20), (1, 5)], head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (7, 1)])
def test_query_heads_read_the_key_head_of_their_group(heads):
    check(make_case([(150, 20)], heads=heads))


@pytest.mark.parametrize("num_rows", [1, 64, 1024])
def test_any_number_of_rows_adds_up(num_rows):
    check(make_case([(130, num_rows)], dtype=torch.bfloat16, counted=0.99))


@pytest.mark.parametrize("spread", [0.0, 4.0, 1e3])
def test_equal_and_huge_logits_give_no_nan(spread):
    check(make_case([(200, 40)], spread=spread))


def test_more_sequences_than_are_counted_at_once_find_their_pages():
    check(make_case([(1 + 37 * i % 150, 1 + i % 3) for i in range(70)], heads=(1, 1)))


def test_what_memory_held_before_does_not_show(monkeypatch):
    case = make_case(RAGGED)
    before = run(case)
    empty = Tensor.new_empty

    def poisoned(*of, **options):
        x = empty(*of, **options)
        return x.fill_(NAN) if x.is_floating_point() else x

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    assert torch.equal(run(case), before)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_whole_softmax_has_the_mass_of_its_rows(name):
    case = make_case([(300, 40)], heads=(4, 2))
    added = (run(case, *IMPLEMENTATIONS[name]) - case.mass)[case.slots[0]].sum()
    weights = case.weights[case.layout.host[0, 0] :][:40]
    assert added == pytest.approx(4 * float(weights.sum()), rel=1e-4)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_batch_mates_do_not_change_a_sequence(name):
    case = make_case([(300, 70), (129, 33), (500, 90)])
    together, apart = (run(x, *IMPLEMENTATIONS[name]) for x in (case, case.only([1])))
    assert torch.equal(together[case.slots[1]], apart[case.slots[1]])
    assert not torch.equal(apart[case.slots[1]], case.mass[case.slots[1]])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_batch_mate_full_of_nan_changes_nothing(name):
    case = make_case([(300, 70), (129, 33)])
    before = run(case, *IMPLEMENTATIONS[name])
    mate = dict(case.layout.sequences())[1]
    for x in (case.q, case.lse.T, case.weights):
        x[mate.queries] = NAN
    case.keys[case.pages[mate.page_row, :2].long()] = NAN
    after = run(case, *IMPLEMENTATIONS[name])
    assert torch.equal(before[case.slots[0]], after[case.slots[0]])
    assert after[case.slots[1], :129].isnan().all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_that_do_not_count_add_nothing(name):
    case = make_case([(130, 20)], counted=0)
    assert torch.equal(run(case, *IMPLEMENTATIONS[name]), case.mass)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [[], [(0, 0)], [(40, 0)], [(0, 5), (40, 0), (0, 0), (140, 3)]])
def test_sequences_without_rows_or_keys_are_no_work(sizes, name):
    case = make_case(sizes, counted=1)
    exact, inside = exact_mass(case)
    mass = run(case, *IMPLEMENTATIONS[name])
    assert torch.equal(mass[~inside], case.mass[~inside])
    torch.testing.assert_close(mass[inside], exact[inside].float())


def test_two_layers_add_up():
    first = make_case(RAGGED)
    second = replace(make_case(RAGGED), layout=first.layout, pages=first.pages, slots=first.slots)
    second = replace(second, lse=first.lse, q=first.q, weights=first.weights, keys=first.keys)
    once = run(first)
    twice = run(replace(second, mass=once))
    torch.testing.assert_close(twice - once, once - first.mass, rtol=1e-4, atol=1e-5)


def test_the_api_runs_the_kernel_on_a_gpu_and_its_twin_elsewhere():
    case, name = make_case(RAGGED), "kernel" if DEVICE == "cuda" else "twin"
    assert torch.equal(run(case, api.token_mass), run(case, *IMPLEMENTATIONS[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", BLOCK_SIZES)
def test_every_shape_compiles_and_equals_float64(tile, dtype, head_dim):
    check(make_case(RAGGED, heads=(6, 2), head_dim=head_dim, dtype=dtype, tile=tile))


@pytest.mark.gpu
def test_a_long_sequence_equals_float64_within_rounding():
    check(make_case([(20000, 128), (1000, 1024)], heads=(8, 2), head_dim=128, dtype=torch.bfloat16))


@pytest.mark.gpu
def test_many_launches_agree_to_the_bit():
    case = make_case([(5000, 160), (129, 33)], heads=(8, 4), head_dim=128, dtype=torch.bfloat16)
    first = run(case)
    for _ in range(100):
        assert torch.equal(run(case), first)
