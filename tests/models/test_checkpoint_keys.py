# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Every key of the authors' configuration classes is honoured, refused or known as harmless."""

import json
import math

import pytest
from checkpoints import write_dream, write_illada, write_llada, write_llada_moe
from transformers import AutoConfig
from vllm.engine.arg_utils import EngineArgs

import sparsed_vllm
from sparsed_vllm.models import config_check
from sparsed_vllm.models.registry import FOREIGN, MODELS, find_class

WRITERS = {
    "LLaDAModelLM": write_llada,
    "ILLaDAForCausalLM": write_illada,
    "LLaDAMoEModelLM": write_llada_moe,
    "DreamModel": write_dream,
}
AUTHORS_KEYS = {
    # ModelConfig in configuration_llada.py, and what LLaDAConfig and d3LLM add
    "LLaDAModelLM": """
        d_model n_heads n_kv_heads n_layers mlp_ratio mlp_hidden_size activation_type block_type
        block_group_size alibi alibi_bias_max rope rope_full_precision flash_attention
        attention_dropout multi_query_attention attention_layer_norm residual_dropout
        embedding_dropout input_emb_norm layer_norm_type layer_norm_with_affine rms_norm_eps
        attention_layer_norm_with_affine max_sequence_length rope_theta include_qkv_bias
        include_bias bias_for_layer_norm scale_logits vocab_size embedding_size weight_tying
        eos_token_id pad_token_id mask_token_id init_device init_fn init_std init_cutoff_factor
        precision use_cache train_max_sequence_length
    """,
    # what modeling_illada.py reads
    "ILLaDAForCausalLM": """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads hidden_act max_position_embeddings rms_norm_eps layer_norm_eps
        rope_theta rope_scaling attention_bias mlp_bias attention_dropout resid_pdrop
        initializer_range pad_token_id tie_word_embeddings
    """,
    # configuration_lladamoe.py
    "LLaDAMoEModelLM": """
        vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act
        max_position_embeddings initializer_range rms_norm_eps use_cache tie_word_embeddings
        attention_dropout attention_bias clip_qkv dense_intermediate_size expert_intermediate_size
        num_experts num_experts_per_tok shared_expert_intermediate_size moe_layer_freq qk_layernorm
        moe_router_score_function moe_router_enable_expert_bias output_router_logits
        router_aux_loss_coef router_num_group router_topk_group routed_scaling_factor
        norm_topk_prob rope_theta rope_scaling partial_rotary_factor eos_token_id pad_token_id
        mask_token_id
    """,
    # configuration_dream.py
    "DreamModel": """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads hidden_act max_position_embeddings initializer_range rms_norm_eps
        use_cache tie_word_embeddings rope_theta rope_scaling use_sliding_window sliding_window
        max_window_layers attention_dropout mask_token_id pad_token_id use_mrope
    """,  # use_mrope: DiffuCoder's
}
SU = {
    "type": "su",
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 256,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.fixture(autouse=True, scope="module")
def registered():
    sparsed_vllm.register()


@pytest.fixture(params=WRITERS)
def checkpoint(request, tmp_path):
    return WRITERS[request.param](tmp_path)


def rewrite(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config = {**config, **{key: value for key, value in changes.items() if value is not ...}}
    removed = {key for key, value in changes.items() if value is ...}
    kept = {key: value for key, value in config.items() if key not in removed}
    (path / "config.json").write_text(json.dumps(kept))
    return path


def start(path, **args):
    """The engine's configuration, which is where an engine that is refused stops."""
    return EngineArgs(str(path), dtype="float32", **args).create_engine_config()


def named(value):
    """For a test's name: that of a function, which is the same in each process."""
    return value.__name__ if callable(value) else str(value)


@pytest.mark.parametrize("architecture", MODELS)
def test_every_key_of_the_authors_is_honoured_refused_or_harmless(architecture):
    config = find_class(MODELS[architecture].config)()
    keys = set(AUTHORS_KEYS[architecture].split())
    assert keys <= config.known_keys() | config.harmless
    assert not config.harmless & config.known_keys()
    assert not config.honoured.keys() & config.computed.keys()


@pytest.mark.parametrize(
    ("architecture", "key"),
    [(name, key) for name in MODELS for key in find_class(MODELS[name].config).computed],
)
def test_a_value_that_is_not_computed_is_refused_by_its_key(tmp_path, architecture, key):
    served = find_class(MODELS[architecture].config).computed[key].served
    value = next(v for v in (True, False, 7, "gelu") if v not in served)
    path = rewrite(WRITERS[architecture](tmp_path), **{key: value})
    with pytest.raises(ValueError, match=f"{key} must be .*, got {value!r}"):
        start(path)


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (write_llada, {"rope": ...}, "rope must be True, got False"),
        (write_llada, {"layer_norm_type": "gemma_rms"}, "layer_norm_type must be 'rms'"),
        (write_llada, {"bias_for_layer_norm": True}, "bias_for_layer_norm"),
        (write_llada, {"multi_query_attention": True}, "multi_query_attention"),
        (write_llada, {"n_kv_heads": 3}, "4 query heads must share 3 key heads"),
        (write_llada, {"n_heads": 0}, "n_heads must be an integer over 0"),
        (write_llada, {"n_layers": 0}, "n_layers must be an integer over 0"),
        (write_llada, {"head_dim": 64}, "head_dim must be absent or 32"),
        (write_llada, {"rope_theta": None, "rope_scaling": {"rope_theta": 0.0}}, "rope_theta"),
        (write_llada, {"mask_token_id": None}, "mask_token_id must be a token"),
        (write_llada, {"mask_token_id": 320}, r"mask_token_id must be a token in \[0, 319\]"),
        (write_llada, {"mask_token_id": ...}, "mask_token_id must be a token.*126336"),
        (write_llada, {"mask_token_id": "[MASK]"}, "mask_token_id must be a token"),
        (write_dream, {"mask_token_id": -1}, "mask_token_id must be a token"),
        (write_dream, {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
        (write_dream, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (write_dream, {"rope_scaling": {"type": "default", "mrope_section": [4, 6, 6]}}, "mrope"),
        (write_dream, {"rope_scaling": {"rope_type": "unheard_of", "factor": 2}}, "unheard_of"),
        (write_dream, {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        (write_dream, {"rope_scaling": [2]}, "rope_scaling must be a mapping"),
        (write_dream, {"rope_scaling": {"type": "linear", "factor": "4"}}, "factor must be a num"),
        (write_dream, {"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a number"),
        (write_dream, {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        (write_llada, {"eos_token_id": "257"}, "eos_token_id must be a token"),
        (write_llada, {"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number over 0"),
        (write_illada, {"rope_theta": ...}, "rope_theta must be a number over 0, got None"),
        (write_illada, {"rms_norm_eps": ...}, "rms_norm_eps must be a number over 0, got None"),
        (write_llada_moe, {"moe_layer_freq": [1, 0]}, "moe_layer_freq must be 1 throughout"),
        (write_dream, {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        (write_llada, {"rotary_pct": 0.25}, "partial_rotary_factor must be 1, got 0.25"),
        (write_llada_moe, {"partial_rotary_factor": 0.3}, "must leave pairs of dimensions"),
        (write_llada, {"rms_norm_eps": math.inf}, "rms_norm_eps must be a number over 0, got inf"),
        (write_dream, {"rope_theta": None}, "rope_theta must be a number over 0, got None"),
        (write_llada, {"quantization": {"bits": 4}}, "quantization must be absent"),
        (write_dream, {"rope_scaling": {**SU, "short_factor": [1.0]}}, "a list of 16 numbers"),
        (write_dream, {"rope_scaling": {**SU, "factor": 2.0}}, "factor must be absent or 4"),
    ],
    ids=named,
)
def test_other_configurations_that_cannot_run_are_refused_by_name(
    tmp_path, write, changes, message
):
    with pytest.raises(ValueError, match=message):
        start(rewrite(write(tmp_path), **changes))


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (write_llada, {"d_model": None}, "d_model must be an integer over 0, got None"),
        (write_dream, {"num_hidden_layers": "2"}, "num_hidden_layers must be an integer over 0"),
        (write_illada, {"num_key_value_heads": None}, "num_key_value_heads must be an integer"),
        (write_llada, {"mlp_hidden_size": None, "mlp_ratio": "4"}, "mlp_ratio must be an integer"),
        (write_llada, {"embedding_size": 300}, "embedding_size must be at least 320"),
        (write_llada_moe, {"num_experts": None}, "num_experts must be an integer over 0"),
        (write_llada_moe, {"num_experts_per_tok": "2"}, "num_experts_per_tok must be an integer"),
        (write_llada_moe, {"num_experts_per_tok": 9}, "num_experts_per_tok must be an integer"),
        (write_dream, {"layer_types": 2}, "layer_types must be a list or null, got 2"),
        (write_dream, {"torch_dtype": "float8"}, "torch_dtype must be the name of a torch.dtype"),
        (write_dream, {"dtype": "float16"}, "dtype: 'float16' and torch_dtype: 'float32'"),
        (write_llada, {"quantization_config": "fp8"}, "quantization_config must be a mapping"),
        (write_llada, {"quantization_config": {"bits": 4}}, "with a quant_method, got {'bits': 4}"),
        (write_llada, {"quantization_config": []}, "quantization_config must be a mapping"),
        (write_llada, {"compression_config": "int8"}, "compression_config must be a mapping"),
        (write_llada, {"torch_dtype": "torch.float32"}, "such as bfloat16, got 'torch.float32'"),
        (write_llada, {"torch_dtype": []}, "torch_dtype must be the name of a torch.dtype"),
        (write_llada, {"vocab_size": "320"}, "vocab_size must be an integer over 0, got '320'"),
        (write_llada, {"embedding_size": "320"}, "embedding_size must be at least 320"),
    ],
    ids=named,
)
def test_what_vllm_would_stumble_over_is_refused_as_config_json_is_read(
    tmp_path, write, changes, message
):
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(rewrite(write(tmp_path), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": None}, "auto_map must be a mapping or absent, got None. Remove it"),
        ({"architectures": "LLaDAModelLM"}, "architectures must be a list of names"),
        ({"architectures": 1}, "architectures must be a list of names"),
    ],
    ids=str,
)
def test_keys_that_every_model_has_are_checked_before_vllm_reads_them(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        start(rewrite(write_llada(tmp_path), **changes))


@pytest.mark.parametrize("model_type", [..., None])
def test_architectures_are_enough_to_find_a_model(checkpoint, model_type):
    config = start(rewrite(checkpoint, model_type=model_type)).model_config.hf_config
    assert config.model_type == type(config).model_type


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 1, "n_head_kv": 1},
        {"max_seq_len": 64, "n_positions": -1, "model_max_length": "128"},
        {"text_config": {"vocab_size": 7}},
        {"num_local_experts": [], "moe_num_experts": "8"},
        {"is_encoder_decoder": True, "num_labels": None, "id2label": []},
        {"attention_chunk_size": 64, "default_max_tokens": "many", "_name_or_path": 3},
    ],
    ids=str,
)
def test_keys_of_other_models_reach_neither_vllm_nor_transformers(tmp_path, changes):
    model = start(rewrite(write_llada(tmp_path), **changes)).model_config
    assert model.max_model_len == 1024
    assert model.get_total_num_kv_heads() == 4
    assert model.get_vocab_size() == 320
    assert not model.is_encoder_decoder
    assert model.attention_chunk_size is None


def test_keys_that_nothing_reads_are_saved_again(tmp_path):
    path = rewrite(write_llada(tmp_path), num_kv_heads=1)
    AutoConfig.from_pretrained(path).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_kv_heads"] == 1


@pytest.mark.parametrize(
    ("write", "sizes", "ranks", "message"),
    [
        (write_llada, {"mlp_hidden_size": 190}, 4, "mlp_hidden_size: 190 evenly"),
        (
            write_dream,
            {"n_heads": 12, "n_kv_heads": 3, "d_model": 384},
            2,
            "num_key_value_heads: 3",
        ),
        (write_llada_moe, {"mlp_hidden_size": 63}, 2, "expert_intermediate_size: 63 evenly"),
    ],
    ids=named,
)
def test_sizes_that_ranks_cannot_share_are_refused_by_name(tmp_path, write, sizes, ranks, message):
    path = write(tmp_path, **sizes)
    with pytest.raises(ValueError, match=f"--tensor-parallel-size {ranks} cannot share {message}"):
        start(path, tensor_parallel_size=ranks)


def test_llada_moe_has_its_authors_defaults_where_they_are_of_use(tmp_path):
    silent = ("num_key_value_heads", "qk_layernorm", "moe_layer_freq", "max_position_embeddings")
    path = rewrite(write_llada_moe(tmp_path), **dict.fromkeys(silent, ...))
    null = ("moe_router_enable_expert_bias", "moe_router_score_function")
    config = start(rewrite(path, **dict.fromkeys(null))).model_config.hf_config
    assert (config.num_key_value_heads, config.qk_norm) == (4, False)
    assert config.max_position_embeddings == 4096


@pytest.mark.parametrize("kv_heads", [{"n_kv_heads": 1}, {"n_kv_heads": None}])
def test_one_key_head_for_all_queries_may_be_said_in_two_ways(tmp_path, kv_heads):
    path = rewrite(write_llada(tmp_path), multi_query_attention=True, **kv_heads)
    assert start(path).model_config.hf_config.num_key_value_heads == 1


def test_a_feed_forward_s_size_may_follow_from_its_ratio(tmp_path):
    path = rewrite(write_llada(tmp_path), mlp_hidden_size=None, mlp_ratio=3)
    assert start(path).model_config.hf_config.intermediate_size == 3 * 128


def test_two_names_of_one_thing_must_agree(tmp_path):
    path = rewrite(write_llada(tmp_path), hidden_size=128, num_key_value_heads=4)
    assert start(path).model_config.hf_config.d_model == 128
    rewrite(path, num_hidden_layers=3)
    with pytest.raises(ValueError, match="n_layers: 2 and num_hidden_layers: 3"):
        start(path)


def test_keys_may_have_transformers_names_alone(tmp_path):
    path = rewrite(
        write_llada(tmp_path), n_heads=..., num_attention_heads=4, n_kv_heads=None, n_layers=...
    )
    config = start(rewrite(path, num_hidden_layers=2)).model_config.hf_config
    assert (config.n_heads, config.n_kv_heads, config.n_layers) == (4, 4, 2)


@pytest.mark.parametrize(
    ("write", "theta"), [(write_llada, 500000), (write_dream, 1e6), (write_illada, 500000)]
)
@pytest.mark.parametrize("scaling", [LINEAR, YARN], ids=str)
def test_a_scaled_rotary_embedding_keeps_its_base(tmp_path, write, theta, scaling):
    rope = start(rewrite(write(tmp_path), rope_scaling=scaling)).model_config.hf_config
    kind = scaling.get("type", scaling.get("rope_type"))
    assert rope.rope_parameters["rope_theta"] == theta
    assert rope.rope_parameters["rope_type"] == kind
    assert rope.rope_parameters["factor"] == 4


def test_a_rotary_base_said_twice_must_be_one(tmp_path):
    path = rewrite(write_llada(tmp_path), rope_parameters={"rope_theta": 10000.0})
    with pytest.raises(ValueError, match="rope_theta: 500000"):
        start(path)
    assert start(rewrite(path, rope_theta=...)).model_config.hf_config.rope_theta == 10000


def test_a_dynamic_scaling_has_the_positions_of_its_table(tmp_path):
    path = rewrite(write_llada(tmp_path), rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match="2048 is beyond the 1024 positions"):
        start(path)
    assert start(path, max_model_len=1024).model_config.max_model_len == 1024


def test_no_position_lies_beyond_the_rotary_embedding(tmp_path, monkeypatch):
    path = rewrite(write_dream(tmp_path), rope_scaling=YARN)
    assert start(path).model_config.max_model_len == 4 * 256
    with pytest.raises(ValueError, match="2048 is beyond the 1024 positions"):
        start(path, hf_overrides={"max_position_embeddings": 2048})
    # Not its environment variable, which vLLM reads once where an engine has run.
    monkeypatch.setattr("vllm.envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN", True, raising=False)
    with pytest.raises(ValueError, match="2048 is beyond the 1024 positions"):
        start(path, max_model_len=2048)


def test_a_window_that_is_not_in_use_is_none(tmp_path):
    path = rewrite(write_dream(tmp_path), sliding_window=131072, use_sliding_window=False)
    assert start(path).model_config.get_sliding_window() is None


@pytest.mark.parametrize("tie", [False, True])
def test_a_configuration_survives_its_own_round_trip(tmp_path, checkpoint, tie):
    tied = "weight_tying" if "LLaDAModelLM" in (checkpoint / "config.json").read_text() else ""
    rewrite(checkpoint, **{tied or "tie_word_embeddings": tie, "rope_scaling": LINEAR})
    before = AutoConfig.from_pretrained(checkpoint)
    before.save_pretrained(tmp_path / "again")
    after = AutoConfig.from_pretrained(tmp_path / "again")
    assert type(after) is type(before)
    assert after.tie_word_embeddings is tie
    theirs, ours = before.to_dict(), after.to_dict()
    assert {key: value for key, value in ours.items() if key != "_name_or_path"} == {
        key: value for key, value in theirs.items() if key != "_name_or_path"
    }


@pytest.mark.parametrize(
    ("write", "overrides", "expected"),
    [
        (write_llada, {"rope_theta": 1e7}, {"rope_theta": 1e7}),
        (write_llada, {"rope_scaling": LINEAR}, {"rope_theta": 500000, "factor": 4}),
        (write_llada, {"rope_parameters": YARN}, {"rope_theta": 500000, "rope_type": "yarn"}),
        (write_llada, {"max_sequence_length": 4096, "rope_theta": 1e7}, {"rope_theta": 1e7}),
        (write_dream, {"rope_scaling": YARN}, {"rope_theta": 1e6, "rope_type": "yarn"}),
    ],
    ids=named,
)
def test_overrides_of_the_rotary_embedding_take_effect(tmp_path, write, overrides, expected):
    model = start(write(tmp_path), hf_overrides=overrides).model_config
    assert model.hf_config.rope_parameters.items() >= expected.items()
    if "max_sequence_length" in overrides:
        assert model.max_model_len == 4096


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_positions": 4096}, "--hf-overrides sets max_positions, which changes nothing"),
        ({"attention_dropout": 0.5}, "attention_dropout, which changes nothing"),
        ({"eos_token_id": 3}, "eos_token_id, which changes nothing"),
        ({"alibi": True}, "alibi must be False, got True"),
        ({"mask_token_id": 9999}, "mask_token_id must be a token"),
        ({"architectures": ["DreamForCausalLM"]}, "DreamForCausalLM is not served"),
        ({"architectures": ["DreamModel"]}, "DreamModel needs the DreamConfig .*got LLaDAConfig"),
        ({"model_type": "Dream"}, "needs the LLaDAConfig .*model_type llada.*, got .*Dream"),
        ({"d_model": None}, "d_model must be an integer over 0, got None"),
        ({"n_kv_heads": None}, "n_kv_heads must be an integer over 0, got None"),
        ({"mlp_ratio": 2}, "mlp_ratio, which is read from config.json only: set mlp_hidden_size"),
        ({"embedding_size": 640}, "embedding_size, which is read from config.json only"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling has factor, which a rope_type default"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be a mapping with"),
        ({"quantization_config": "fp8"}, "quantization_config must be a mapping with"),
        ({"architectures": "LLaDAModelLM"}, "architectures must be a list of names"),
        ({"num_local_experts": []}, "num_local_experts, which changes nothing"),
    ],
    ids=str,
)
def test_overrides_that_nothing_reads_or_that_cannot_run_are_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        start(write_llada(tmp_path), hf_overrides=overrides)


def test_unknown_keys_are_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(
        config_check.logger, "handlers", [*config_check.logger.handlers, caplog.handler]
    )
    start(rewrite(write_llada(tmp_path), gated_delta=True))
    assert "LLaDAConfig does not know, and nothing here reads: gated_delta." in caplog.text


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_published_keys_are_all_known(tmp_path, write, caplog, monkeypatch):
    monkeypatch.setattr(
        config_check.logger, "handlers", [*config_check.logger.handlers, caplog.handler]
    )
    start(write(tmp_path))
    assert "does not know" not in caplog.text


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_other_diffusion_models_are_refused_with_who_serves_them(tmp_path, foreign):
    path = write_dream(tmp_path)
    rewrite(path, architectures=[foreign.architecture], model_type=foreign.model_type)
    with pytest.raises(ValueError, match=f"{foreign.architecture} is not served by .* Use "):
        start(path)


def test_a_config_json_without_architectures_is_its_type_s_first_model(tmp_path):
    path = rewrite(write_llada(tmp_path), architectures=...)
    assert start(path).model_config.architecture == "LLaDAModelLM"


def test_architectures_tell_models_of_one_type_apart(tmp_path):
    config = AutoConfig.from_pretrained(write_llada_moe(tmp_path))
    assert (config.model_type, config.experts) == ("llada", 8)
    assert config.architectures == ["LLaDAMoEModelLM"]


@pytest.mark.parametrize(
    "args", [{"enable_expert_parallel": True}, {"data_parallel_size": 2}], ids=str
)
def test_experts_are_not_spread_over_ranks(tmp_path, args):
    with pytest.raises(ValueError, match="experts"):
        start(write_llada_moe(tmp_path), **args)


def test_remote_code_is_not_read_though_it_is_trusted(checkpoint):
    config = start(checkpoint, trust_remote_code=True).model_config.hf_config
    assert type(config).__module__.startswith("sparsed_vllm.")


def test_experts_are_found_by_their_layer_s_name(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm.envs.VLLM_USE_LAYERNAME", False, raising=False)
    with pytest.raises(ValueError, match="VLLM_USE_LAYERNAME=0 and experts"):
        start(write_llada_moe(tmp_path))
