# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Which kernel attends over lists, what the log says of it, and what no kernel is given."""

import logging
from dataclasses import replace

import pytest
import torch
import triton
from kernel_cases import make_batch, scattered_tables

from sparsed_vllm.kernels import api, block_sparse_attention, reference
from sparsed_vllm.kernels.choice import Choice, Forbidden, Noise

GPU = torch.device("cuda", 0)
SUITED = {"dtype": torch.bfloat16, "tile": 128, "head_dim": 128, "aligned": True}


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    """What torch and Triton say of themselves on one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    api._sparse_kernel.cache_clear()
    yield
    api._sparse_kernel.cache_clear()


def log_of(caplog, device=GPU, **tensors):
    """The chosen function's module, and the lines that two choices leave in the log."""
    caplog.clear()
    api.logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger=api.logger.name):
            chosen = [api._sparse_kernel(device, **SUITED | tensors) for _ in range(2)]
    finally:
        api.logger.removeHandler(caplog.handler)
    assert chosen[0] is chosen[1]
    return chosen[0].__module__, set(caplog.messages)


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.9.0+git1234"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_h100_runs_the_kernel_for_hopper(monkeypatch, caplog, dtype, head_dim, version):
    pytest.importorskip("sparsed_vllm.kernels.hopper", reason="this Triton has no Gluon")
    monkeypatch.setattr(triton, "__version__", version)
    module, lines = log_of(caplog, dtype=dtype, head_dim=head_dim)
    assert module == "sparsed_vllm.kernels.hopper"
    assert lines == {"Sparse attention runs our Gluon kernel for Hopper."}


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"dtype": torch.float32}, "torch.float32"),
        ({"tile": 64}, "query blocks have 64 tokens"),
        ({"head_dim": 96}, "heads have 96 numbers"),
        ({"aligned": False}, "not aligned to 16 bytes"),
    ],
)
def test_other_tensors_run_the_plain_kernel_and_the_log_says_why(caplog, tensors, why):
    module, (line,) = log_of(caplog, **tensors)
    assert module == block_sparse_attention.__name__ and why in line


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_another_gpu_runs_the_plain_kernel_and_the_log_says_why(monkeypatch, caplog, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    module, (line,) = log_of(caplog)
    assert module == block_sparse_attention.__name__ and str(capability) in line


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0"])
def test_another_triton_runs_the_plain_kernel_and_the_log_says_why(monkeypatch, caplog, version):
    monkeypatch.setattr(triton, "__version__", version)
    module, (line,) = log_of(caplog)
    assert module == block_sparse_attention.__name__
    assert f"Triton {version} is not one of 3.6 to 3.9" in line


def test_the_cpu_runs_the_twin(caplog):
    assert log_of(caplog, torch.device("cpu"))[0] == reference.__name__


@pytest.mark.parametrize(
    ("tensor", "aligned"),
    [
        (torch.empty(5, 48, 64, dtype=torch.bfloat16)[:, 32:40], True),  # of a fused projection
        (torch.empty(5 * 64 + 1, dtype=torch.bfloat16)[1:].view(5, 1, 64), False),
        (torch.empty(5, 2, 68, dtype=torch.bfloat16)[:, :, :64], False),
    ],
)
def test_alignment_is_of_the_first_number_and_of_the_strides(tensor, aligned):
    assert api._is_aligned(tensor) is aligned


def refuses(call, *args, **options):
    with pytest.raises(AssertionError):
        call(*args, **options)


def test_a_draw_needs_noise_and_nothing_else_takes_it():
    logits, forbidden = torch.zeros(3, 9), Forbidden(0)
    rows = torch.arange(3)
    noise = Noise(rows, rows, rows)
    refuses(api.choose_tokens, logits, Choice(1.0), forbidden, None)
    refuses(api.choose_tokens, logits, Choice(), forbidden, noise)
    refuses(api.choose_tokens, logits[:2], Choice(1.0), forbidden, noise)
    refuses(api.draw_uniform, Noise(rows, rows, rows.int()))
    assert len(api.choose_tokens(logits, Choice(1.0), forbidden, noise)[0]) == 3


def test_tables_must_have_a_row_for_each_block_and_hold_every_list():
    batch = make_batch([(300, 100), (40, 3)], 32)
    q, k, v, of = batch.q, batch.k, batch.v, (batch.layout, batch.selection)
    scores = api.block_scores(q, k, None, *of, scale=1.0)
    most = batch.selection.most_kept
    tables, narrow = scattered_tables(batch, most), scattered_tables(batch, most - 1)
    api.select_blocks(*scores, *of, tables)
    api.block_sparse_attention(q, k, v, batch.layout, tables, scale=1.0)
    refuses(api.select_blocks, *scores, *of, narrow)
    other_size = make_batch([(300, 100), (40, 3)], 64)
    refuses(api.block_sparse_attention, q, k, v, other_size.layout, tables, scale=1.0)
    few = replace(tables, pages=tables.pages[:1])
    refuses(api.block_sparse_attention, q, k, v, batch.layout, few, scale=1.0)


def test_only_whole_sequences_are_scored():
    batch = make_batch([(300, 100)], 32)
    window = batch.windows([(64, 300)])
    refuses(api.block_scores, batch.q, batch.k, None, window.layout, batch.selection, scale=1.0)


def test_a_layout_must_lie_in_its_tensors():
    batch = make_batch([(300, 100)], 32)
    q, k, v = batch.q, batch.k, batch.v
    api.dense_attention(q, k, v, batch.layout, scale=1.0)
    refuses(api.dense_attention, q[:300], k, v, batch.layout, scale=1.0)
    refuses(api.dense_attention, q, k[:300], v[:300], batch.layout, scale=1.0)
    refuses(api.dense_attention, q, k, v[1:], batch.layout, scale=1.0)
