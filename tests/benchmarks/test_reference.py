# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The authors' path at a tiny size: that its steps are what they are said to be."""

import json

import bench_reference
import pytest
import torch
from generation.steps import Load
from needle.network import Network, Shape, full_attention

SHAPE = Shape(vocab_size=1000, n_layers=2, n_heads=2, d_model=64, mlp_hidden_size=64)


@pytest.fixture
def network():
    return Network(SHAPE).requires_grad_(False)


@pytest.fixture
def tokens():
    return torch.randint(100, (1, 512))


def test_a_step_reads_every_row(network, tokens):
    choice, surest = bench_reference.denoise_once(network, tokens, full_attention)
    assert choice.shape == tokens.shape and surest.shape == (1, 512, 1)
    assert torch.allclose(surest[..., 0], network(tokens).softmax(-1).max(-1).values)


def test_sparse_steps_list_a_share_of_the_blocks(network, tokens):
    """Compiled FlexAttention reads the lists; what runs here, uncompiled, does not."""
    mask = bench_reference.random_blocks(2, 512, "cpu")
    assert mask.full_kv_num_blocks.unique().tolist() == [int(4 * 0.3) + 1]
    attend = bench_reference.sparse_attention(512, 2, "cpu")
    assert bench_reference.denoise_once(network, tokens, attend)[1].isfinite().all()


def test_lines_hold_the_steps_and_what_they_add_up_to(network, monkeypatch, capsys):
    args = bench_reference.parse(["--lengths", "256", "--steps", "10", "--rounds", "1"])
    bench_reference.measure(args, network, Load(256, 128), "cpu")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = {line["phase"]: line["seconds"] for line in lines[:2]}
    dense, sparse = lines[2:]
    assert dense["mode"] == "dense" and dense["seconds"] == pytest.approx(10 * steps["dense"])
    expected = 4 * steps["dense"] + 6 * steps["sparse"]  # int(10 * 0.2) + 1, and the one recording
    assert sparse["mode"] == "sparse" and sparse["seconds"] == pytest.approx(expected)


def test_a_length_that_does_not_fit_is_named(monkeypatch, capsys):
    def full():
        raise torch.OutOfMemoryError("out of\nmemory")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    bench_reference.guarded(full, 65536)
    assert "65536 tokens do not fit: out of memory" in capsys.readouterr().err
