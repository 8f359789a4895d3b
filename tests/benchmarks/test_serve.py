# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Both models of the serving bench are of one size, and served under one tokenizer."""

import json

import bench_serve
from transformers import AutoConfig, AutoTokenizer


def test_the_native_model_has_the_same_sizes(tmp_path):
    shape = bench_serve.SHAPES["needle"]
    llama = bench_serve.write(tmp_path / "llama", bench_serve.llama_config(shape))
    config = AutoConfig.from_pretrained(llama)
    assert (config.hidden_size, config.intermediate_size) == (shape.d_model, shape.mlp_hidden_size)
    assert (config.num_hidden_layers, config.vocab_size) == (shape.n_layers, shape.vocab_size)


def test_the_mask_is_the_tokenizers(tmp_path):
    shape = bench_serve.SHAPES["llada"]
    folder = bench_serve.write(tmp_path / "llada", bench_serve.llada_config(shape, False))
    mask = json.loads((folder / "config.json").read_text())["mask_token_id"]
    assert AutoTokenizer.from_pretrained(folder).mask_token_id == mask


def test_each_number_of_steps_is_asked_exact_and_with_reuse():
    found = bench_serve.contenders(bench_serve.parse(["--steps", "8", "32"]))
    assert found["exact, 8 steps"] == {"kv_reuse": 0, "steps": 8}
    assert found["reuse, 32 steps"] == {"kv_share": 0.02, "steps": 32}
