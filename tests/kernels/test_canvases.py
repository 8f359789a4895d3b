# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The kernels that open, fill and hand out canvases, against their twins, to the bit."""

from dataclasses import fields

import pytest
import torch
from canvas_cases import INF, NAN, make_case, rows_of
from kernel_cases import DEVICE
from torch import Tensor

from sparsed_vllm.kernels import api, reference
from sparsed_vllm.kernels import canvas as c
from sparsed_vllm.kernels.canvas import CanvasState, SequenceEnds, SequenceRows
from sparsed_vllm.kernels.fill_canvases import fill_canvases
from sparsed_vllm.kernels.open_canvases import open_canvases
from sparsed_vllm.kernels.take_canvases import take_canvases
from sparsed_vllm.kernels.write_ids import write_ids

POISON = -7654321
SEEDS = range(12)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What memory held before is nothing that a kernel may leave there."""
    new_empty, empty_like = Tensor.new_empty, torch.empty_like

    def poison(x):
        return x.fill_(True if x.dtype == torch.bool else POISON)

    monkeypatch.setattr(Tensor, "new_empty", lambda *of, **how: poison(new_empty(*of, **how)))
    monkeypatch.setattr(torch, "empty_like", lambda *of, **how: poison(empty_like(*of, **how)))


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b)


def assert_same_state(actual, expected):
    """All but the last row, which takes what is written for padding."""
    for field in fields(CanvasState):
        a, b = (getattr(state, field.name) for state in (actual, expected))
        assert torch.equal(a.cpu()[: len(expected.seeds)], b[: len(expected.seeds)]), field.name


def check_open(case):
    rows = rows_of(case, open_canvases, DEVICE)
    assert_same(rows, rows_of(case, reference.open_canvases))
    return rows


def check_fill(case, draws=True):
    """Fill by kernel and twin; returns the canvases, and which rows were chosen."""
    states, chosen = [], []
    for fill, device in ((fill_canvases, DEVICE), (reference.fill_canvases, "cpu")):
        state, columns = case.on(device)
        rows = rows_of(case, reference.open_canvases, device)
        uniform = case.uniform.to(device) if draws else None
        chosen.append(fill(state, columns, rows, *case.results(device), uniform).cpu())
        states.append(state)
    assert torch.equal(*chosen)
    assert_same_state(*states)
    return states[0], chosen[0]


def check_take(case, with_ends=True):
    states, taken, ends = [], [], []
    for take, device in ((take_canvases, DEVICE), (reference.take_canvases, "cpu")):
        state, columns = case.on(device)
        lens = torch.arange(2 * len(state.seeds), dtype=torch.int32, device=device)
        of = SequenceEnds(*lens.view(2, -1)) if with_ends else None
        taken.append(take(state, columns, of))
        ends.append(lens.cpu())
        states.append(state)
    assert_same(*taken)
    assert torch.equal(*ends)
    assert_same_state(*states)
    return taken[1]


def light_rows(case, state, device, num_rows, num_light=300):
    """Rows of any places, behind those of the canvases."""
    draw = torch.Generator().manual_seed(5)
    seqs = torch.randint(case.host.shape[1], (num_light,), generator=draw)
    slots = torch.from_numpy(case.slots)[seqs]
    prompt_lens = torch.randint(0, 90, (len(state.seeds),), generator=draw).int()
    lengths = prompt_lens[slots] + torch.from_numpy(case.host[c.NUM_TOKENS]).int()[seqs]
    places = (torch.rand(num_light, generator=draw) * lengths).long()
    rows = num_rows + torch.randperm(num_light, generator=draw)
    prompts = torch.randint(1000, (len(state.seeds), 1000), generator=draw).int()
    positions = torch.full((num_rows + num_light,), POISON)
    given = (rows, places, seqs, prompts, prompt_lens, positions)
    return SequenceRows(*(x.to(device) for x in given))


def check_write(case, with_light=True):
    num_rows, written = int(case.host[c.NUM_TOKENS].sum()), []
    for write, device in ((write_ids, DEVICE), (reference.write_ids, "cpu")):
        state, columns = case.on(device)
        light = light_rows(case, state, device, num_rows) if with_light else None
        ids = torch.full((num_rows + 300,), POISON, dtype=torch.int32, device=device)
        write(state, columns, ids, 5, light)
        positions = light.positions.cpu() if with_light else torch.zeros(0)
        written.append((ids.cpu(), positions))
    assert_same(*written)
    return written[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_ragged_batch_is_opened_as_by_the_twin(seed):
    check_open(make_case(seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("draws", [False, True])
def test_a_ragged_batch_is_filled_as_by_the_twin(seed, draws):
    check_fill(make_case(seed), draws)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("with_ends", [False, True])
def test_a_ragged_batch_is_handed_out_as_by_the_twin(seed, with_ends):
    check_take(make_case(seed), with_ends)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("with_light", [False, True])
def test_a_ragged_batch_is_written_as_by_the_twin(seed, with_light):
    # Every canvas has a place that is computed.
    check_write(make_case(seed), with_light)


def test_places_before_the_first_that_is_computed_are_not_written():
    case = make_case(3, NUM_TOKENS=100, FIRST_PLACE=60)
    ids, _ = check_write(case)
    ids = ids[: case.host.shape[1] * 100].view(-1, 100)
    assert (ids[:, :60] == POISON).all() and (ids[:, 60:] != POISON).all()


def test_places_that_a_canvas_has_yet_to_grow_by_are_not_written():
    case = make_case(3, NUM_TOKENS=100, FIRST_PLACE=0)
    case.host[c.NUM_SEEN] = 60
    ids, _ = check_write(case)
    ids = ids[: case.host.shape[1] * 100].view(-1, 100)
    assert (ids[:, :60] != POISON).all() and (ids[:, 60:] == POISON).all()


POLICIES = {
    "by rank": {"NUM_FILLED": 5, "THRESHOLD": INF, "SHARE": 0, "ALG_TEMP": 0, "BY_CHANCE": 0},
    "random": {"NUM_FILLED": 5, "THRESHOLD": INF, "SHARE": 0, "ALG_TEMP": 0, "BY_CHANCE": 1},
    "threshold": {"NUM_FILLED": 1, "THRESHOLD": 0.5, "SHARE": 0, "ALG_TEMP": 0, "BY_CHANCE": 0},
    "origin": {"NUM_FILLED": 0, "THRESHOLD": INF, "SHARE": 0.3, "ALG_TEMP": 0, "BY_CHANCE": 0},
    "alg_temp": {"NUM_FILLED": 9, "THRESHOLD": INF, "SHARE": 0, "ALG_TEMP": 0.4, "BY_CHANCE": 0},
    "nothing": {"NUM_FILLED": 0, "THRESHOLD": INF, "SHARE": 0, "ALG_TEMP": 0, "BY_CHANCE": 0},
    "all": {"NUM_FILLED": 999, "THRESHOLD": INF, "SHARE": 0, "ALG_TEMP": 0, "BY_CHANCE": 0},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_each_policy_fills_what_the_twin_fills(policy, seed):
    _, chosen = check_fill(make_case(seed, NUM_OPEN=150, **POLICIES[policy]))
    assert bool(chosen.any()) == (policy != "nothing")


def test_of_equal_scores_the_first_rows_are_filled():
    case = make_case(
        1, NUM_TOKENS=200, BLOCK_LENGTH=200, END=200, NUM_OPEN=200, **POLICIES["by rank"]
    )
    case.state.masked[:] = True
    case.confidence[:] = torch.tensor([0.0, -0.0]).repeat(len(case.confidence) // 2)
    _, chosen = check_fill(case)
    assert torch.equal(chosen, torch.arange(len(chosen)) % 200 < 5)


def test_what_is_no_number_is_filled_first_and_noted():
    case = make_case(
        1, NUM_TOKENS=200, BLOCK_LENGTH=200, END=200, NUM_OPEN=200, **POLICIES["by rank"]
    )
    case.state.masked[:], case.state.has_failed[:] = True, False
    case.largest[:] = 1.0
    case.confidence[:] = 0.5
    bad = torch.arange(len(case.confidence)) % 200 == 150
    case.confidence[bad], case.largest[bad] = NAN, NAN
    state, chosen = check_fill(case)
    assert chosen[bad].all() and state.has_failed[case.slots].all()


def test_a_place_handed_out_before_takes_its_own_token():
    case = make_case(2, NUM_TOKENS=100, BLOCK_LENGTH=100, END=100, NUM_OPEN=100, **POLICIES["all"])
    case.state.masked[:] = True
    case.state.num_taken[:] = 30
    state, chosen = check_fill(case)
    assert chosen.all()
    for slot, tokens in zip(case.slots, state.tokens.cpu()[case.slots], strict=True):
        assert torch.equal(tokens[:30], case.state.tokens[slot, :30])
    start = int(case.host[c.ROW_START, 0])
    assert torch.equal(
        state.tokens.cpu()[case.slots[0], 30:100].long(), case.tokens[start:][30:100]
    )


@pytest.mark.parametrize("block_length", [50, 100])
def test_steps_are_counted_from_each_block_s_first(block_length):
    """A step that fills a block ends its count; the last block's counts on where it is the only."""
    case = make_case(
        4, NUM_TOKENS=100, BLOCK_LENGTH=block_length, END=100, NUM_OPEN=50, **POLICIES["all"]
    )
    case.state.masked[:] = torch.arange(case.state.longest) < 100
    case.state.masked[:, : 100 - block_length] = False
    before = case.state.block_steps[case.slots]
    state, _ = check_fill(case)
    counted = before + 1 if block_length == 100 else torch.zeros_like(before)
    assert torch.equal(state.block_steps.cpu()[case.slots], counted)


def test_rows_that_no_place_is_left_for_are_padding():
    case = make_case(5, NUM_TOKENS=100, BLOCK_LENGTH=100, END=100, NUM_OPEN=150)
    case.state.masked[:] = torch.arange(case.state.longest) % 4 == 1
    places = check_open(case).places.view(-1, 150).cpu()
    assert (places[:, :25] == 4 * torch.arange(25) + 1).all() and (places[:, 25:] == -1).all()


def test_requests_without_rows_are_opened_filled_and_handed_out():
    case = make_case(6, NUM_OPEN=0)
    assert all(len(x) == 0 for x in check_open(case))
    check_fill(case)
    check_take(case)


def test_a_step_that_may_hand_out_nothing_hands_out_nothing():
    taken = check_take(make_case(7, MAY_HAND_OUT=0))
    assert taken.tokens.shape[1] == 0 and not taken.counts.any()


@pytest.mark.parametrize("num_reqs", [1, 70])
def test_batches_of_one_and_of_many(num_reqs):
    case = make_case(8, num_reqs=num_reqs, longest=90, block_lengths=(9, 30))
    check_open(case)
    check_fill(case)
    check_take(case)
    check_write(make_case(8, num_reqs=num_reqs, longest=90))


def test_the_api_runs_the_kernels_on_a_gpu_and_their_twins_elsewhere():
    case = make_case(9)
    state, columns = case.on(DEVICE)
    expected, of_twin = case.on("cpu")
    rows = api.open_canvases(state, columns)
    twin_rows = reference.open_canvases(expected, of_twin)
    assert_same(rows, twin_rows)
    chosen = api.fill_canvases(state, columns, rows, *case.results(DEVICE), case.uniform.to(DEVICE))
    own = reference.fill_canvases(expected, of_twin, twin_rows, *case.results("cpu"), case.uniform)
    assert torch.equal(chosen.cpu(), own)
    assert_same(
        api.take_canvases(state, columns, None), reference.take_canvases(expected, of_twin, None)
    )
    ids = torch.zeros(int(case.host[c.NUM_TOKENS].sum()), dtype=torch.int32)
    there = ids.to(DEVICE)
    api.write_ids(state, columns, there, 5, None)
    reference.write_ids(expected, of_twin, ids, 5, None)
    assert torch.equal(there.cpu(), ids)
    assert_same_state(state, expected)
