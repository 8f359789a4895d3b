# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The steps that an engine takes before requests come."""

import pytest
import torch

from sparsed_vllm import attention, rehearsal
from sparsed_vllm.attention import SparsedImpl
from sparsed_vllm.config import SparseConfig


@pytest.mark.parametrize("scoring_scale", [None, 0.5])
@pytest.mark.parametrize("block_size", [16, 128])
def test_a_rehearsal_records_and_follows_with_no_error(block_size, scoring_scale, monkeypatch):
    monkeypatch.setattr(attention.logger, "exception", pytest.fail)
    ran, api = [], attention.api
    for name in ("block_scores", "select_blocks", "block_sparse_attention"):
        monkeypatch.setattr(api, name, noting(ran, name, getattr(api, name)))
    compiled = []
    monkeypatch.setattr(api, "compile_selection", lambda *args: compiled.append(args))
    impl = SparsedImpl(4, 32, 0.2, num_kv_heads=2, scoring_scale=scoring_scale)
    cpu = torch.device("cpu")
    config = SparseConfig(block_size=block_size)
    rehearsal.rehearse(impl, config, longest=1000, dtype=torch.float32, device=cpu)
    assert ran == ["block_scores", "select_blocks", "block_sparse_attention"]
    assert compiled == [(63, 4, torch.int16, cpu)]


def noting(ran, name, call):
    def run(*args, **kwargs):
        ran.append(name)
        return call(*args, **kwargs)

    return run
