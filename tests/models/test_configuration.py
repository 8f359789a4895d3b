# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Reading the authors' config.json, and what vLLM is told to do differently."""

import json
import re
from dataclasses import replace

import pytest
from checkpoints import write_dream, write_llada
from transformers import AutoConfig, AutoTokenizer
from vllm.engine.arg_utils import EngineArgs

import sparsed_vllm
from sparsed_vllm.admission import sparse_config_of
from sparsed_vllm.config import SparseConfig
from sparsed_vllm.models import hook


@pytest.fixture(autouse=True, scope="module")
def registered():
    sparsed_vllm.register()


def vllm_config(path, **args):
    return EngineArgs(str(path), dtype="float32", **args).create_engine_config()


def rewrite(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_llada_s_keys_answer_to_vllm_s_names(tmp_path):
    config = AutoConfig.from_pretrained(write_llada(tmp_path, n_kv_heads=2))
    assert (config.hidden_size, config.d_model) == (128, 128)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert (config.num_hidden_layers, config.intermediate_size) == (2, 192)
    assert config.max_position_embeddings == 1024
    assert config.mask_token_id == 258
    assert config.rope_parameters["rope_theta"] == 500000


def test_llada_s_vocabulary_is_its_embedding(tmp_path):
    write_llada(tmp_path)
    rewrite(tmp_path, vocab_size=300, embedding_size=320)
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == 320


def test_dream_s_config_keeps_its_mask_and_rope(tmp_path):
    config = AutoConfig.from_pretrained(write_dream(tmp_path, n_kv_heads=2))
    assert config.num_key_value_heads == 2
    assert config.attention_bias
    assert config.rope_parameters["rope_theta"] == 1e6


def test_dream_s_tokenizer_loads_from_vocabulary_and_merges(tmp_path):
    folder = write_dream(tmp_path)
    whole = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(whole["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "DreamTokenizer"
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("any text")) == "any text"


@pytest.mark.parametrize("write", [write_llada, write_dream])
def test_a_sequence_is_never_split_or_shared(tmp_path, write):
    config = vllm_config(write(tmp_path))
    assert not config.scheduler_config.enable_chunked_prefill
    assert not config.cache_config.enable_prefix_caching
    assert config.scheduler_config.scheduler_cls == "sparsed_vllm.scheduler.DenoisingScheduler"
    assert config.use_v2_model_runner


def test_backends_that_only_look_back_are_ruled_out(tmp_path):
    assert vllm_config(write_llada(tmp_path)).attention_config.use_non_causal


def test_the_token_budget_holds_the_longest_sequence(tmp_path):
    write_llada(tmp_path, max_length=16384)
    config = vllm_config(tmp_path)
    assert config.scheduler_config.max_num_batched_tokens >= 16384


@pytest.mark.parametrize(("given", "default"), [({}, 0.0), ({"temperature": 0.3}, 0.3)])
def test_temperature_defaults_to_zero_unless_the_checkpoint_has_its_own(tmp_path, given, default):
    write_llada(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert vllm_config(tmp_path).model_config.get_diff_sampling_param()["temperature"] == default


@pytest.mark.parametrize(
    ("given", "device", "said"),
    [
        ({}, "NVIDIA H100 80GB HBM3", "8192 tokens or more .* on an H100"),
        ({"skip": 0.1}, "NVIDIA B200", "8192 tokens or more .* B200 was not measured"),
        ({"min_length": 7}, "NVIDIA B200", "7 tokens or more .* as sparsed.min_length says"),
    ],
    ids=str,
)
def test_the_log_says_from_which_length_requests_run_sparse_and_why(
    tmp_path, monkeypatch, caplog, given, device, said
):
    monkeypatch.setattr(hook.current_platform, "get_device_name", lambda: device)
    monkeypatch.setattr(hook.logger, "propagate", True)
    with caplog.at_level("INFO", logger="vllm.sparsed.config"):
        config = vllm_config(write_llada(tmp_path), additional_config={"sparsed": given})
    assert re.search(said, caplog.text)
    assert sparse_config_of(config) == replace(SparseConfig(), **given)


def test_a_user_s_own_default_is_kept(tmp_path):
    write_llada(tmp_path)
    config = vllm_config(tmp_path, override_generation_config={"temperature": 0.7})
    assert config.model_config.get_diff_sampling_param()["temperature"] == 0.7


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"block_size": 64}, "--block-size 64"),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "--decode-context"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"enable_expert_parallel": True}, "experts"),
        ({"kv_transfer_config": {"kv_connector": "x", "kv_role": "kv_both"}}, "--kv-transfer"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative"),
        ({"runner": "pooling"}, "--runner pooling"),
        ({"convert": "embed"}, "--runner pooling"),
        ({"diffusion_config": {"canvas_length": 8}}, "--diffusion-config"),
        ({"logits_processors": ["some.module:Processor"]}, "--logits-processors"),
        ({"watermark_config": {"key": 1}}, "--watermark-config"),
        ({"logprobs_mode": "raw_logits"}, "--logprobs-mode raw_logits"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path, args, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        vllm_config(write_llada(tmp_path), **args)


@pytest.mark.parametrize("scheme", ["fp8", "fp8_per_tensor"])
def test_what_a_cpu_cannot_quantize_is_refused_by_name(tmp_path, monkeypatch, scheme):
    args = {"dtype": "bfloat16", "quantization": scheme}
    monkeypatch.setattr(hook.current_platform, "is_cpu", lambda: True)
    with pytest.raises(ValueError, match=f"--quantization {scheme} on a CPU"):
        EngineArgs(str(write_llada(tmp_path)), **args).create_engine_config()


@pytest.mark.parametrize("flag", ["enable_prefix_caching", "enable_chunked_prefill"])
def test_what_splits_or_shares_a_sequence_stays_off_though_asked_for(tmp_path, flag):
    config = vllm_config(write_llada(tmp_path), **{flag: True})
    assert not config.scheduler_config.enable_chunked_prefill
    assert not config.cache_config.enable_prefix_caching


def test_a_user_s_own_scheduler_is_replaced_and_the_log_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(hook.logger, "handlers", [*hook.logger.handlers, caplog.handler])
    config = vllm_config(write_llada(tmp_path), scheduler_cls="some.Scheduler")
    assert config.scheduler_config.scheduler_cls == "sparsed_vllm.scheduler.DenoisingScheduler"
    assert "replaces the scheduler some.Scheduler" in caplog.text


@pytest.mark.parametrize("scheme", ["int8_per_channel_weight_only", "nvfp4_per_token"])
def test_schemes_that_would_quantize_nothing_are_refused_by_name(tmp_path, scheme):
    with pytest.raises(ValueError, match=f"--quantization {scheme}"):
        args = {"dtype": "bfloat16", "quantization": scheme}
        EngineArgs(str(write_llada(tmp_path)), **args).create_engine_config()


def test_the_v1_runner_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm.envs.VLLM_USE_V2_MODEL_RUNNER", False, raising=False)
    with pytest.raises(ValueError, match="V1 model runner"):
        vllm_config(write_llada(tmp_path))
