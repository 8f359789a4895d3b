# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The oracle against itself: schedules, loops on made-up logits, networks written a second time."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import checkpoints
import pytest
import torch
from oracle import (
    Layer,
    LogitsFn,
    Network,
    Run,
    assert_same_tokens,
    dream_count,
    dream_generate,
    llada_generate,
    load_dream,
    load_llada,
    plan_blocks,
    split_evenly,
    split_steps,
)
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

MASK, VOCAB = 30, 32
PROMPT = [3, 1, 4, 1, 5]
ALGORITHMS = ["maskgit_plus", "topk_margin", "entropy"]


def random_logits(seed: int = 0) -> LogitsFn:
    """Logits drawn anew for each content, which never favour the mask token."""

    def logits(ids: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed + hash(tuple(ids[0].tolist())) % 2**31)
        drawn = 3 * torch.randn(1, ids.shape[1], VOCAB, generator=generator)
        drawn[..., MASK] = -10
        return drawn

    return logits


def mask_lovers(ids: Tensor) -> Tensor:
    """Logits whose favourite is the mask token everywhere."""
    logits = random_logits()(ids)
    logits[..., MASK] = 20
    return logits


def recorder(logits_fn: LogitsFn, seen: list[list[int]]) -> LogitsFn:
    def record(ids: Tensor) -> Tensor:
        seen.append(ids[0].tolist())
        return logits_fn(ids)

    return record


def masks_before_each_forward(generate: Callable, **options) -> list[int]:
    """How many mask tokens each forward pass of a loop saw."""
    seen: list[list[int]] = []
    generate(recorder(random_logits(), seen), PROMPT, mask_id=MASK, **options)
    return [ids.count(MASK) for ids in seen]


@pytest.mark.parametrize("sizes", [[8], [8, 8], [8, 8, 3], [5, 1], [1, 1, 1, 1], [1]])
@pytest.mark.parametrize("steps", [4, 5, 7, 16, 19, 64])
def test_steps_are_all_given_out_and_every_block_gets_one(steps, sizes):
    shares = split_steps(steps, sizes)
    assert sum(shares) == steps and min(shares) >= 1


@pytest.mark.parametrize("size", [1, 8])
def test_steps_split_evenly_where_the_authors_ask_for_it(size):
    assert split_steps(12, [size] * 4) == [3] * 4


def test_a_step_a_token_stays_a_step_a_token_when_the_last_block_is_short():
    assert split_steps(19, [8, 8, 3]) == [8, 8, 3]


def test_fewer_steps_than_blocks_count_as_one_a_block():
    assert split_steps(2, [8, 8, 3]) == [1, 1, 1]


def test_the_last_block_may_be_shorter():
    assert plan_blocks(5, 20, 8, 20) == [(5, 13, 8), (13, 21, 8), (21, 25, 4)]


def test_masks_split_evenly_with_the_odd_ones_first():
    assert split_evenly(10, 4) == [3, 3, 2, 2]
    assert split_evenly(2, 4) == [1, 1, 0, 0]


def test_dream_fills_32_places_in_16_steps_as_its_float32_times_say():
    left, counts = 32, []
    for step in range(16):
        counts.append(dream_count(left, step, 16, 1e-3))
        left -= counts[-1]
    assert counts == [1, *[2] * 14, 3]


@pytest.mark.parametrize("steps, block_length", [(20, 20), (7, 20), (9, 6), (2, 6), (64, 20)])
def test_llada_fills_every_place_in_the_given_steps(steps, block_length):
    options = {"steps": steps, "gen_length": 20, "block_length": block_length, "mask_id": MASK}
    run = llada_generate(random_logits(), PROMPT, **options)
    assert len(run.ids) == 20 and MASK not in run.ids
    assert run.forwards == max(steps, math.ceil(20 / block_length))


@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize("steps, block_length", [(20, None), (7, None), (9, 6), (64, None)])
def test_dream_fills_every_place_in_the_given_steps(steps, block_length, alg):
    options = {"steps": steps, "max_new_tokens": 20, "block_length": block_length, "alg": alg}
    run = dream_generate(random_logits(), PROMPT, mask_id=MASK, **options)
    assert len(run.ids) == 20 and MASK not in run.ids
    assert run.forwards == steps


def test_a_block_is_full_before_the_next_begins():
    seen: list[list[int]] = []
    options = {"steps": 8, "gen_length": 12, "block_length": 4, "mask_id": MASK}
    llada_generate(recorder(random_logits(), seen), PROMPT, **options)
    for ids in seen:
        canvas = [token == MASK for token in ids[len(PROMPT) :]]
        first = canvas.index(True) // 4
        assert not any(canvas[: 4 * first]) and all(canvas[4 * (first + 1) :])


@pytest.mark.parametrize("threshold", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    "generate, length",
    [(llada_generate, {"gen_length": 20}), (dream_generate, {"max_new_tokens": 20, "alg": "x"})],
)
def test_a_threshold_fills_at_least_one_place_a_step(generate, length, threshold):
    options = {"steps": 1, "block_length": 8, "threshold": threshold, **length}
    left = [*masks_before_each_forward(generate, **options), 0]
    assert all(before > after for before, after in pairwise(left))
    assert (len(left) - 1 == 20) == (threshold == 1.0)


def test_a_threshold_takes_every_place_that_is_sure():
    everywhere = torch.zeros(1, 25, VOCAB)
    everywhere[..., 7] = 20.0
    options = {"steps": 20, "gen_length": 20, "block_length": 20, "mask_id": MASK}
    run = llada_generate(lambda ids: everywhere, PROMPT, threshold=0.9, **options)
    assert run.ids == [7] * 20 and run.forwards == 1


def test_a_favoured_mask_token_is_forbidden_or_leaves_the_place_masked():
    options = {"steps": 8, "gen_length": 8, "block_length": 8, "mask_id": MASK}
    assert MASK not in llada_generate(mask_lovers, PROMPT, **options).ids
    assert llada_generate(mask_lovers, PROMPT, forbid_mask=False, **options).ids == [MASK] * 8


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_forbidding_the_mask_token_changes_nothing_where_it_is_no_favourite(alg):
    options = {"steps": 7, "max_new_tokens": 20, "alg": alg, "mask_id": MASK}
    runs = [
        dream_generate(random_logits(), PROMPT, forbid_mask=f, **options) for f in (True, False)
    ]
    assert runs[0] == runs[1]


def test_a_mask_token_in_the_prompt_is_left_alone():
    seen: list[list[int]] = []
    options = {"steps": 4, "gen_length": 4, "block_length": 4, "mask_id": MASK}
    llada_generate(recorder(random_logits(), seen), [MASK, 2], **options)
    assert all(ids[:2] == [MASK, 2] for ids in seen)


def test_dream_reads_the_row_before_a_place_from_the_last_of_the_prompt_on():
    rows = torch.zeros(1, 8, VOCAB)
    rows[0, torch.arange(8), torch.arange(8)] = 9.0  # row i says token i
    options = {"steps": 3, "max_new_tokens": 3, "alg": "entropy", "mask_id": MASK}
    assert dream_generate(lambda ids: rows, PROMPT, **options).ids == [4, 5, 6]


def test_a_tie_is_reported_and_a_clear_run_is_not():
    options = {"steps": 4, "gen_length": 4, "block_length": 4, "mask_id": MASK}
    assert llada_generate(lambda ids: torch.zeros(1, 9, VOCAB), PROMPT, **options).met_a_tie()
    assert not llada_generate(random_logits(), PROMPT, **options).met_a_tie()


def test_a_comparison_that_compares_too_little_fails():
    def run(ids, closest):
        return Run(ids, forwards=1, closest=closest, logprobs=[0.0])

    decided, tied = run([1], 1.0), run([2], 0.0)
    assert_same_tokens([[1], [1], [1], [3]], [decided, decided, decided, tied])
    with pytest.raises(AssertionError):
        assert_same_tokens([[2]], [decided])
    for actual, expected in (([], []), ([[2]], [tied]), ([[1], [2]], [decided, tied])):
        with pytest.raises(AssertionError, match="met no tie"):
            assert_same_tokens(actual, expected)


def second_network(net: Network, ids: Tensor) -> Tensor:
    """The same network out of PyTorch's own pieces and complex rotations.

    ids [1, L] -> logits [1, L, vocab]
    """
    x = torch.nn.functional.embedding(ids, net.embedding)
    for layer in net.layers:
        x = x + second_attention(net, layer, rms_norm(x, x.shape[-1:], layer.attn_norm, net.eps))
        h = rms_norm(x, x.shape[-1:], layer.mlp_norm, net.eps)
        gate, up = h @ layer.mlp.gate[0].T, h @ layer.mlp.up[0].T
        x = x + (gate / (1 + gate.neg().exp()) * up) @ layer.mlp.down[0].T
    return rms_norm(x, x.shape[-1:], net.norm, net.eps) @ net.head.T


def second_attention(net: Network, layer: Layer, x: Tensor) -> Tensor:
    """x [1, L, hidden] -> [1, L, hidden]"""
    q, k, v = (
        (x @ w.T + (0 if b is None else b)).view(1, x.shape[1], heads, -1).transpose(1, 2)
        for (w, b), heads in (
            (layer.q, net.num_heads),
            (layer.k, net.num_kv_heads),
            (layer.v, net.num_kv_heads),
        )
    )
    q, k = second_rotation(q, net.rope_theta), second_rotation(k, net.rope_theta)
    out = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return out.transpose(1, 2).reshape(x.shape) @ layer.o[0].T


def second_rotation(x: Tensor, theta: float) -> Tensor:
    """x [1, heads, L, head_dim]: the halves are real and imaginary part of numbers that turn."""
    real, imaginary = x.chunk(2, dim=-1)
    exponent = -torch.arange(real.shape[-1], dtype=torch.float64) / real.shape[-1]
    angle = torch.outer(torch.arange(x.shape[2], dtype=torch.float64), theta**exponent)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


@pytest.mark.parametrize("kv_heads, shards, tie", [(4, 1, False), (2, 3, False), (1, 2, True)])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_both_networks_equal_a_second_formulation(tmp_path, family, kv_heads, shards, tie):
    net = random_network(tmp_path, family, n_kv_heads=kv_heads, shards=shards, tie=tie)
    for length in (1, 2, 33, 200):
        ids = torch.randint(320, (1, length), generator=torch.Generator().manual_seed(length))
        expected = second_network(net, ids)
        assert (net(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_shards_hold_what_one_file_holds(tmp_path):
    one = random_network(tmp_path / "one", "llada", shards=1)
    three = random_network(tmp_path / "three", "llada", shards=3)
    ids = torch.arange(9)[None]
    assert torch.equal(one(ids), three(ids))


def test_the_last_place_is_seen_by_the_first(tmp_path):
    net = random_network(tmp_path, "dream")
    ids = torch.arange(9)[None]
    other = ids.clone()
    other[0, -1] = 100
    assert (net(ids)[0, 0] - net(other)[0, 0]).abs().max() > 1e-2


def random_network(path: Path, family: str, **options) -> Network:
    if family == "llada":
        return load_llada(checkpoints.write_llada(path, **options))
    return load_dream(checkpoints.write_dream(path, **options))
