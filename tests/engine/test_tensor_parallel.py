# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Two processes that share the network give the tokens of one."""

import pytest
from checkpoints import write_llada_moe
from ranks import generate, needs_two_devices

pytestmark = [pytest.mark.engine, needs_two_devices]


def test_tensor_parallel_ranks_agree_with_one_process(tmp_path, llada_path):
    tokens, counts = generate(tmp_path, llada_path, ranks=2)
    tokens_of_one, counts_of_one = generate(tmp_path, llada_path, ranks=1)
    assert tokens == tokens_of_one
    of_one_rank = {f"vllm:sparsed_{name}_blocks " for name in ("kept", "possible")}
    for name in counts.keys() - of_one_rank:
        assert counts[name] == counts_of_one[name], name
    possible = "vllm:sparsed_possible_blocks "
    assert 2 * counts[possible] == counts_of_one[possible] > 0


def test_experts_and_the_norms_of_heads_are_shared_out_too(tmp_path):
    path = write_llada_moe(tmp_path / "moe", mlp_hidden_size=64, n_kv_heads=2)
    tokens, _ = generate(tmp_path, path, ranks=2)
    assert tokens == generate(tmp_path, path, ranks=1)[0]
