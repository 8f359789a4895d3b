# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Two processes that share the network give the tokens of one."""

import pytest
from checkpoints import write_llada_moe
from engines import start_engine
from ranks import SIZES, answers_of, answers_of_ranks, needs_two_devices

pytestmark = [pytest.mark.engine, pytest.mark.ranks, needs_two_devices]


def test_tensor_parallel_ranks_agree_with_one_process(llada_path):
    # Scheduled ahead, as a GPU would, a step may be on its way when a threshold ends its request.
    tokens, counts = answers_of_ranks(llada_path, 2, async_scheduling=False)
    tokens_of_one, counts_of_one = answers_of(start_engine(llada_path, **SIZES))
    assert tokens == tokens_of_one
    of_one_rank = {f"vllm:sparsed_{name}_blocks " for name in ("kept", "possible")}
    for name in counts.keys() - of_one_rank:
        assert counts[name] == counts_of_one[name], name
    possible = "vllm:sparsed_possible_blocks "
    assert 2 * counts[possible] == counts_of_one[possible] > 0


def test_experts_and_the_norms_of_heads_are_shared_out_too(tmp_path):
    path = write_llada_moe(tmp_path / "moe", mlp_hidden_size=64, n_kv_heads=2)
    tokens, _ = answers_of_ranks(path, 2)
    assert tokens == answers_of(start_engine(path, **SIZES))[0]
