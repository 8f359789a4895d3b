# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The sparse oracle against itself: phases, selection on made-up scores, both ends of select."""

import math

import pytest
import torch
from oracle import Network, dream_generate, llada_generate, load_dream, load_llada
from sparse_oracle import (
    SparseNetwork,
    Sparsity,
    best_blocks,
    block_scores,
    blocks_holding,
    closest_leads,
    over_places,
    select_blocks,
    sparse_dream_generate,
    sparse_llada_generate,
)
from torch import Tensor

MASK = 300
PROMPT = list(range(40, 90))  # 50 places, so that a block of 16 straddles its end
LLADA = {"steps": 16, "gen_length": 24, "block_length": 8, "mask_id": MASK}
DREAM = {"steps": 12, "max_new_tokens": 24, "alg": "entropy", "mask_id": MASK}
GENERATE = {
    "llada": (llada_generate, sparse_llada_generate, LLADA),
    "dream": (dream_generate, sparse_dream_generate, DREAM),
}


@pytest.fixture(params=["llada", "dream"])
def family(request) -> str:
    return request.param


@pytest.fixture
def net(family, llada_path, dream_path) -> Network:
    return load_llada(llada_path) if family == "llada" else load_dream(dream_path)


def masked_request(net: Network, **options) -> tuple[SparseNetwork, Tensor]:
    """A request for 24 places, and its ids before the first step."""
    ids = torch.tensor([[*PROMPT, *[MASK] * 24]])
    return SparseNetwork(net, Sparsity(**options), len(PROMPT), 24), ids


def random_heads(length: int) -> tuple[Tensor, Tensor]:
    q, k = torch.randn(2, 3, length, 8)
    return q, k


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_keeping_every_block_gives_the_dense_tokens(net, family, threshold):
    dense, sparse, options = GENERATE[family]
    expected = dense(net, PROMPT, threshold=threshold, **options)
    sparsity = Sparsity(select=1.0, block_size=16)
    run = sparse(net, PROMPT, sparsity=sparsity, threshold=threshold, **options)
    assert run.masks.all() and run.leads.isinf().all()
    assert (run.ids, run.forwards) == (expected.ids, expected.forwards)


def test_skipping_every_step_gives_the_dense_run_and_never_records(net, family):
    dense, sparse, options = GENERATE[family]
    run = sparse(net, PROMPT, sparsity=Sparsity(skip=1.0), **options)
    expected = dense(net, PROMPT, **options)
    assert run.masks is None and run.leads is None
    assert (run.ids, run.closest) == (expected.ids, expected.closest)


def test_sparsity_reaches_the_tokens(net, family):
    dense, sparse, options = GENERATE[family]
    run = sparse(net, PROMPT, sparsity=Sparsity(select=0.1, block_size=16), **options)
    assert run.masks.shape == (2, 4, 5, 5) and not run.masks.all()
    assert run.ids != dense(net, PROMPT, **options).ids
    assert run.closest <= run.leads.min()


@pytest.mark.parametrize("skip, steps, recording", [(0.0, 50, 1), (0.2, 16, 4), (0.58, 50, 29)])
def test_the_masks_are_recorded_once_and_used_from_the_next_step_on(net, skip, steps, recording):
    """50 * 0.58 is less than 29 in floating point and cut down to 28."""
    sparse, ids = masked_request(net, skip=skip, select=0.1, block_size=16, total_steps=steps)
    dense = net(ids)
    for _ in range(recording):
        assert torch.equal(sparse(ids), dense) and sparse.masks is None
    assert torch.equal(sparse(ids), dense)
    masks = sparse.masks
    assert (sparse(ids) - dense).abs().max() > 1e-3
    sparse(ids.flip(1))
    assert sparse.masks is masks


def test_every_query_head_keeps_its_own_blocks(net):
    """Of 5 blocks of 16 the last begins after the prompt: 0.3 keeps two, and one of that part."""
    sparse, ids = masked_request(net, skip=0.0, block_size=16, total_steps=8)
    for _ in range(2):
        sparse(ids)
    assert sparse.masks.shape == (2, 4, 5, 5)
    assert sparse.masks[..., 4].all()
    assert (sparse.masks[..., :4].sum(-1) <= 2).all()
    assert net.num_kv_heads < net.num_heads
    assert not (sparse.masks == sparse.masks[:, :1]).all()


def test_a_network_with_a_mask_sees_nothing_of_dropped_blocks(net):
    sparse, ids = masked_request(net, skip=0.0, block_size=16, total_steps=8)
    for _ in range(2):
        sparse(ids)
    sparse.masks = torch.eye(5, dtype=torch.bool).repeat(2, 4, 1, 1)
    other = ids.clone()
    other[0, :16] += 7
    change = (sparse(ids) - sparse(other)).abs().amax(dim=(0, 2))
    assert change[:16].min() > 1e-3 and not change[16:].any()
    sparse.masks[1] = True  # every layer has its own
    assert (sparse(ids) - sparse(other)).abs().amax(dim=(0, 2)).min() > 1e-4


@pytest.mark.parametrize("length", [96, 100, 33, 5])
def test_scores_are_shares_of_rows_and_ragged_blocks_count_their_missing_places(length):
    q, k = random_heads(length)
    scores = block_scores(q, k, (32, 32))
    rows = torch.full((math.ceil(length / 32),), 32)
    rows[-1] = length - 32 * (len(rows) - 1)
    assert torch.allclose(scores.sum(-1) * 32**2, rows.double())
    weights = (q.double() @ k.double().mT / 8**0.5).softmax(-1)
    assert scores[1, -1, 0].isclose(weights[1, 32 * (len(rows) - 1) :, :32].sum() / 32**2)


def test_query_blocks_may_be_of_several_key_blocks():
    q, k = random_heads(100)
    fine, tall = block_scores(q, k, (16, 16)), block_scores(q, k, (64, 16))
    assert tall.shape == (3, 2, 7)
    padded = torch.nn.functional.pad(fine, (0, 0, 0, 1))
    assert torch.allclose(tall, padded.unflatten(1, (2, 4)).mean(2))
    sparsity = Sparsity(select=0.3, block_size=16, query_block_size=64)
    masks, _ = select_blocks(q, k, sparsity, 32)
    assert torch.equal(masks[..., :5], best_blocks(tall, 3)[..., :5])
    seen = over_places(masks, sparsity.sizes, 100)
    assert torch.equal(seen[:, 63], seen[:, 0]) and torch.equal(seen[:, 64], seen[:, 99])


@pytest.mark.parametrize("length, gen_length", [(96, 32), (100, 32), (100, 3), (33, 32), (300, 99)])
@pytest.mark.parametrize("select", [0.01, 0.3, 0.5, 1.0])
def test_selection_equals_a_loop_over_sorted_scores(length, gen_length, select):
    q, k = random_heads(length)
    masks, _ = select_blocks(q, k, Sparsity(select=select, block_size=32), gen_length)
    num_blocks = math.ceil(length / 32)
    first_gen = min(math.ceil((length - gen_length) / 32), num_blocks - 1)
    scores, gen_scores = (block_scores(q, keys, (32, 32)) for keys in (k, k[:, 32 * first_gen :]))
    for head, row in torch.cartesian_prod(torch.arange(3), torch.arange(num_blocks)).tolist():
        best = top(scores[head, row].tolist(), int(num_blocks * select) + 1)
        gen = top(gen_scores[head, row].tolist(), int((num_blocks - first_gen) * select) + 1)
        expected = {i for i in best if i < first_gen} | {first_gen + i for i in gen}
        assert set(masks[head, row].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("length, gen_length", [(96, 32), (100, 3), (33, 32), (300, 99)])
@pytest.mark.parametrize("mass", [0.3, 0.6, 0.95])
def test_by_mass_a_row_keeps_what_holds_it_and_not_a_block_more(length, gen_length, mass):
    q, k = random_heads(length)
    masks, leads = select_blocks(3 * q, k, Sparsity(mass=mass, block_size=16), gen_length)
    first_gen = Sparsity(block_size=16).first_generation_block(length, gen_length)
    logits = 3 * q.double() @ k.double().mT / 8**0.5
    parts = [logits.softmax(-1), logits[..., 16 * first_gen :].softmax(-1)]
    needed = torch.zeros_like(masks)
    for first, weights in zip((0, first_gen), parts, strict=True):
        for head, row in torch.cartesian_prod(
            torch.arange(3), torch.arange(len(masks[0]))
        ).tolist():
            rows = weights[head, 16 * row : 16 * row + 16].sum(0) / min(16, length - 16 * row)
            held = sorted(((float(x.sum()), first + i) for i, x in enumerate(rows.split(16))))[::-1]
            count = next(n for n in range(1, 99) if sum(x for x, _ in held[:n]) >= mass)
            needed[head, row, [block for _, block in held[:count]]] = True
    assert torch.equal(masks, needed) and (leads > 0).all()


def test_a_mass_that_some_blocks_hold_to_a_hair_is_a_tie():
    scores = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]], dtype=torch.float64)
    mask, leads = blocks_holding(scores, 0.75)
    assert mask.tolist() == [[[True, True, False, False]]] and leads.item() == 0
    mask, leads = blocks_holding(scores, 0.7)
    assert mask.tolist() == [[[True, True, False, False]]]
    assert leads.item() == pytest.approx(math.log(0.75 / 0.7))


def top(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


@pytest.mark.parametrize(
    "length, gen_length, first", [(96, 32, 2), (97, 32, 3), (100, 3, 3), (20, 9, 0), (64, 64, 0)]
)
def test_generation_blocks_hold_generated_places_only_or_are_the_last(length, gen_length, first):
    assert Sparsity(block_size=32).first_generation_block(length, gen_length) == first


def test_of_equal_scores_the_lower_block_wins_and_it_is_a_tie():
    scores = torch.tensor([[[0.1, 0.3, 0.1, 0.1]]], dtype=torch.float64)
    mask = best_blocks(scores, 2)
    assert mask.tolist() == [[[True, True, False, False]]]
    assert closest_leads(scores, mask, 4).tolist() == [[0.0]]


def test_a_lead_counts_only_where_a_block_before_the_generation_is_concerned():
    scores = torch.tensor([[[4.0, 1.0, 2.0, 2.0]]], dtype=torch.float64)
    mask = best_blocks(scores, 2)  # 0 and 2 of 0, 1 | 2, 3
    lead = closest_leads(scores, mask, 2)
    assert lead.item() == pytest.approx(math.log(2))  # 2 over 1, or 0 over 3


def test_a_mask_of_blocks_covers_their_places():
    mask = torch.tensor([[True, False], [False, True]])
    ones = torch.ones(2, 2, dtype=torch.bool)
    expected = torch.block_diag(ones, ones[:1, :1]).bool()
    assert torch.equal(over_places(mask, (2, 2), 3), expected)
