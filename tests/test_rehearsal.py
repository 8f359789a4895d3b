# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The steps that an engine takes before requests come."""

import pytest
import torch

from sparsed_vllm import attention, canvases, rehearsal
from sparsed_vllm.attention import SparsedImpl
from sparsed_vllm.config import SparseConfig
from sparsed_vllm.pages import PageLayout
from sparsed_vllm.tables import TablePages

CPU = torch.device("cpu")


def impl_of(max_model_len=1000, holds_kv=False):
    tables = TablePages(num_heads=4, ids_per_token=8, dtype=torch.int16)
    pages = PageLayout(2, 32, torch.float32, holds_kv, tables)
    sizes = {"max_num_tokens": 2000, "max_model_len": max_model_len}
    return SparsedImpl(4, 32, 0.2, num_kv_heads=2, pages=pages, **sizes)


@pytest.mark.parametrize(
    ("block_size", "mass", "query_block_size"),
    [(16, None, None), (128, None, None), (128, 0.9, None), (32, None, 128)],
)
def test_a_rehearsal_attends_records_and_follows(block_size, mass, query_block_size, monkeypatch):
    ran, api = [], attention.api
    for name in ("dense_attention", "block_scores", "select_blocks", "block_sparse_attention"):
        monkeypatch.setattr(api, name, noting(ran, name, getattr(api, name)))
    compiled = []
    compile_selection = lambda *args, by_mass=False: compiled.append((*args, by_mass))  # noqa: E731
    monkeypatch.setattr(api, "compile_selection", compile_selection)
    config = SparseConfig(block_size=block_size, mass=mass, query_block_size=query_block_size)
    rehearsal.rehearse(impl_of(), config, dtype=torch.float32, device=CPU)
    assert ran == [
        "dense_attention",
        "dense_attention",
        "block_scores",
        "select_blocks",
        "block_sparse_attention",
        "block_sparse_attention",
    ]
    ways = [False] if mass is None else [False, True]
    assert compiled == [(63, torch.int16, CPU, by_mass) for by_mass in ways]


KERNELS = [
    *("dense_attention", "block_scores", "block_sparse_attention", "write_pages"),
    *("paged_attention", "paged_block_sparse_attention", "token_mass"),
]


def test_a_rehearsal_s_light_steps_have_the_engine_s_blocks(monkeypatch):
    layouts = []

    def attend(q, keys, values, layout, tables, **options):
        layouts.append((layout.tile, layout.block_size))
        return paged(q, keys, values, layout, tables, **options)

    paged = attention.api.paged_block_sparse_attention
    monkeypatch.setattr(attention.api, "paged_block_sparse_attention", attend)
    config = SparseConfig(block_size=32, query_block_size=128)
    rehearsal.rehearse(impl_of(holds_kv=True), config, dtype=torch.float32, device=CPU)
    assert set(layouts) == {(128, 32)}


@pytest.mark.parametrize("name", KERNELS)
def test_a_rehearsal_raises_what_a_kernel_raises(name, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(attention.api, name, failing)
    with pytest.raises(RuntimeError, match="out of registers"):
        impl = impl_of(holds_kv=True)
        rehearsal.rehearse(impl, SparseConfig(), dtype=torch.float32, device=CPU)


STEPS = ["open_canvases", "write_ids", "fill_canvases", "take_canvases"]


def test_a_rehearsal_advances_a_canvas_with_and_without_what_a_step_may_lack(monkeypatch):
    ran, api = [], canvases.api
    for name in STEPS:
        monkeypatch.setattr(api, name, noting(ran, name, getattr(api, name)))
    rehearsal.rehearse_canvases(canvases.Canvases(3, 5, CPU))
    assert ran == STEPS * 2


def noting(ran, name, call):
    def run(*args, **kwargs):
        ran.append(name)
        return call(*args, **kwargs)

    return run
