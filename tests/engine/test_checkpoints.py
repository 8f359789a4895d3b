# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Every model, and every key of config.json that is honoured, against plain PyTorch."""

import json

import oracle
import pytest
import torch
from checkpoints import (
    DREAM_MASK_ID,
    ILLADA_MASK_ID,
    LLADA_MASK_ID,
    write_dream,
    write_illada,
    write_llada,
    write_llada_moe,
)
from engines import start_engine
from quantized import quantize_int8
from safetensors.torch import load_file, save_file
from sparse_oracle import Sparsity, sparse_llada_generate
from vllm import SamplingParams

pytestmark = pytest.mark.engine

PROMPTS = [[7 + i * 5 % 200 for i in range(length)] for length in (1, 40, 130)]
SPARSE = {"use_sparsed": 1, "sparsed_block_size": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def rewrite(path, changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def edit(path, *, without=(), **extra):
    """Drop tensors from a checkpoint of one file, and add or replace others."""
    file = path / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if name not in without}
    save_file({**kept, **extra}, file, metadata={"format": "pt"})
    return path


def add_biases(path, names):
    """Give linear layers, named by the ends of their tensors' names, biases that are felt."""
    draw = torch.Generator().manual_seed(1)
    weights = load_file(path / "model.safetensors")
    biases = {
        name.replace(".weight", ".bias"): 0.5 * torch.randn(len(weight), generator=draw)
        for name, weight in weights.items()
        if name.split(".")[-2] in names and "layers" in name.replace("blocks", "layers")
    }
    return edit(path, **biases)


def start(path, **args):
    return start_engine(path, max_model_len=256, **args)


def tokens_of(llm, **extra):
    """What the engine generates for each prompt: 16 places in 8 steps."""
    params = SamplingParams(
        temperature=0,
        max_tokens=16,
        ignore_eos=True,
        detokenize=False,
        extra_args={"steps": 8, **extra},
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def runs_of(network, mask_id):
    return [
        oracle.llada_generate(
            network, prompt, steps=8, gen_length=16, block_length=16, mask_id=mask_id
        )
        for prompt in PROMPTS
    ]


def growing_runs_of(network, mask_id):
    def generate(prompt, length, steps):
        sizes = {"gen_length": length, "block_length": length, "mask_id": mask_id}
        return oracle.llada_generate(network, prompt, steps=steps, **sizes)

    sizes = {"gen_length": 16, "block_length": 4, "steps": 2}
    return [oracle.var_generate(generate, prompt, **sizes) for prompt in PROMPTS]


def sparse_runs_of(network, mask_id):
    sizes = {"steps": 8, "gen_length": 16, "block_length": 16, "mask_id": mask_id}
    sparsity = Sparsity(block_size=16)
    return [sparse_llada_generate(network, p, sparsity=sparsity, **sizes) for p in PROMPTS]


def dream_runs_of(network):
    return [
        oracle.dream_generate(
            network, prompt, steps=8, max_new_tokens=16, alg="entropy", mask_id=DREAM_MASK_ID
        )
        for prompt in PROMPTS
    ]


def assert_same(tokens, runs):
    assert sum(not run.met_a_tie() for run in runs) >= 2, "too many ties to compare"
    for ids, run in zip(tokens, runs, strict=True):
        assert run.met_a_tie() or ids == run.ids


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LINEAR},
        {"rope_scaling": LLAMA3},
        {"scale_logits": True, "mlp_hidden_size": None, "mlp_ratio": 4},
    ],
    ids=str,
)
def test_llada_s_keys_are_honoured(tmp_path, changes):
    sizes = {"mlp_hidden_size": 512} if "mlp_ratio" in changes else {}
    path = rewrite(write_llada(tmp_path, n_kv_heads=2, **sizes), changes)
    config = json.loads((path / "config.json").read_text())
    assert_same(tokens_of(start(path)), runs_of(oracle.load_llada(path), LLADA_MASK_ID))
    assert config.items() >= changes.items()


def test_llada_s_biases_of_queries_keys_and_values_are_honoured(tmp_path):
    path = rewrite(write_llada(tmp_path), {"include_qkv_bias": True})
    add_biases(path, ("q_proj", "k_proj", "v_proj"))
    assert_same(tokens_of(start(path)), runs_of(oracle.load_llada(path), LLADA_MASK_ID))


def test_illada_s_biases_are_honoured(tmp_path):
    path = rewrite(write_illada(tmp_path), {"attention_bias": True, "mlp_bias": True})
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    add_biases(path, attention + mlp)
    assert_same(tokens_of(start(path)), runs_of(oracle.load_illada(path), ILLADA_MASK_ID))


def test_dream_runs_with_yarn_and_a_window_that_is_not_in_use(tmp_path):
    changes = {"rope_scaling": YARN, "sliding_window": 131072, "use_sliding_window": False}
    path = rewrite(write_dream(tmp_path, n_kv_heads=2), changes)
    tokens = tokens_of(start(path), alg="entropy")
    assert_same(tokens, dream_runs_of(oracle.load_dream(path)))


@pytest.mark.parametrize("tie", [True, False])
def test_illada_generates_as_its_authors_code(tmp_path, tie):
    path = write_illada(tmp_path, n_kv_heads=2, tie=tie)
    llm, network = start(path), oracle.load_illada(path)
    assert_same(tokens_of(llm), runs_of(network, ILLADA_MASK_ID))
    assert_same(tokens_of(llm, **SPARSE), sparse_runs_of(network, ILLADA_MASK_ID))
    growing = tokens_of(llm, variable_length=1, block_length=4)
    assert_same(growing, growing_runs_of(network, ILLADA_MASK_ID))


def test_llada_moe_generates_as_its_authors_code(tmp_path):
    path = write_llada_moe(tmp_path, mlp_hidden_size=64)
    llm, network = start(path), oracle.load_llada_moe(path)
    assert_same(tokens_of(llm), runs_of(network, LLADA_MASK_ID))
    assert_same(tokens_of(llm, **SPARSE), sparse_runs_of(network, LLADA_MASK_ID))


def test_a_compiled_llada_moe_finds_the_experts_of_its_last_layer(tmp_path):
    path = write_llada_moe(tmp_path, mlp_hidden_size=64)
    tokens = tokens_of(start(path, enforce_eager=False))
    assert_same(tokens, runs_of(oracle.load_llada_moe(path), LLADA_MASK_ID))


LLADA_BLOCK = "model.transformer.blocks.1."


@pytest.mark.parametrize(
    ("write", "without", "extra", "message"),
    [
        (
            write_dream,
            [f"model.layers.{i}.self_attn.k_proj.bias" for i in range(2)],
            {},
            r"lacks model.layers.0.self_attn.k_proj.bias, model.layers.1.self_attn.k_proj.bias",
        ),
        (write_dream, ["lm_head.weight"], {}, "lacks lm_head.weight"),
        (write_dream, ["model.norm.weight"], {}, "lacks model.norm.weight"),
        (
            write_dream,
            ["model.norm.weight"],
            {"norm.weight": torch.ones(128)},
            "lacks model.norm.weight, .* It holds norm.weight instead",
        ),
        (
            write_llada,
            [LLADA_BLOCK + "ff_out.weight", "model.transformer.ff_out.weight"],
            {},
            "lacks model.transformer.blocks.1.ff_out.weight, model.transformer.ff_out.weight",
        ),
        (
            write_llada,
            [],
            {LLADA_BLOCK + "attn_out.bias": torch.ones(128)},
            "holds model.transformer.blocks.1.attn_out.bias, which a model",
        ),
        (
            write_llada,
            [],
            {LLADA_BLOCK + "q_norm.weight": torch.ones(128)},
            "holds model.transformer.blocks.1.q_norm.weight",
        ),
        (
            write_llada,
            [],
            {LLADA_BLOCK + "ff_proj.weight": torch.ones(256, 128)},
            r"blocks.1.ff_proj.weight \(\[256, 128\] instead of \[192, 128\]\)",
        ),
        (
            write_llada_moe,
            ["model.layers.1.mlp.experts.7.up_proj.weight"],
            {"model.layers.1.mlp.experts.8.up_proj.weight": torch.ones(192, 128)},
            "lacks model.layers.1.mlp.experts.7.up_proj.weight",
        ),
        (
            write_llada,
            [],
            {LLADA_BLOCK + "ff_out.weight": torch.ones(128, 192, dtype=torch.int8)},
            r"blocks.1.ff_out.weight \(torch.int8 where nothing is quantized\)",
        ),
        (write_llada, [], {"lm_head.weight": torch.ones(320, 128)}, r"\(a second time\)"),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value)[:40],
)
def test_a_checkpoint_that_does_not_fit_its_config_json_is_refused(
    tmp_path, write, without, extra, message
):
    path = edit(write(tmp_path), without=without, **extra)
    with pytest.raises(ValueError, match=message):
        start_engine(path)


@pytest.mark.parametrize(
    ("without", "extra", "message"),
    [
        (["q_proj.weight_scale"], {}, r"lacks model.transformer.blocks.1.q_proj.weight_scale,"),
        (["k_proj.weight"], {}, r"lacks model.transformer.blocks.1.k_proj.weight,"),
        ([], {"ff_out.weight_zero_point": torch.zeros(128, 1)}, "holds .*weight_zero_point"),
        ([], {"ff_out.weight": torch.ones(128, 192)}, "torch.float32 instead of torch.int8"),
        ([], {"ff_out.weight_scale": torch.ones(64, 1)}, r"ff_out.weight_scale \(\[64, 1\]"),
    ],
    ids=str,
)
def test_a_quantized_checkpoint_without_all_its_tensors_is_refused(
    tmp_path, without, extra, message
):
    path = quantize_int8(write_llada(tmp_path / "plain"), tmp_path / "int8")
    edit(
        path,
        without=[LLADA_BLOCK + name for name in without],
        **{LLADA_BLOCK + name: tensor for name, tensor in extra.items()},
    )
    with pytest.raises(ValueError, match=message):
        start_engine(path, dtype="bfloat16")


def test_weights_that_are_quantized_as_they_load_must_all_be_there(tmp_path):
    path = edit(write_llada(tmp_path), without=[LLADA_BLOCK + "up_proj.weight"])
    with pytest.raises(ValueError, match=r"lacks .*blocks.1.up_proj.weight"):
        start_engine(path, dtype="bfloat16", quantization="fp8_per_channel")


def test_files_that_hold_nothing_are_vllm_s_to_name(tmp_path):
    (write_llada(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        start_engine(tmp_path)


def test_a_file_that_torch_cannot_read_is_refused(tmp_path):
    path = write_llada(tmp_path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"The checkpoint's files cannot be read: UnpicklingError"):
        start_engine(path)


def test_a_head_beside_a_tied_embedding_is_refused(tmp_path):
    path = edit(
        write_llada(tmp_path, tie=True),
        **{"model.transformer.ff_out.weight": torch.ones(320, 128)},
    )
    with pytest.raises(ValueError, match=r"ff_out.weight.* weight_tying"):
        start_engine(path)


@pytest.mark.parametrize("write", [write_dream, write_illada])
def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tmp_path, write):
    path = edit(write(tmp_path, tie=True), **{"lm_head.weight": torch.ones(320, 128)})
    with pytest.raises(ValueError, match=r"lm_head.weight is not the embedding, which tie_word"):
        start_engine(path)


def test_a_copy_of_the_tied_embedding_passes_as_the_head(tmp_path):
    path = write_illada(tmp_path)
    copy = load_file(path / "model.safetensors")["model.embed_tokens.weight"].clone()
    edit(path, **{"lm_head.weight": copy})
    assert_same(tokens_of(start(path)), runs_of(oracle.load_illada(path), ILLADA_MASK_ID))


def test_heads_without_a_kernel_are_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"Heads must have .* dimensions, got 24"):
        start_engine(write_llada(tmp_path, d_model=96))


def model_of(llm):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.model


def test_tensors_without_an_effect_pass_and_later_updates_may_be_partial(tmp_path):
    path = edit(
        write_llada(tmp_path),
        **{
            LLADA_BLOCK + "attn_out.bias": torch.zeros(128),
            LLADA_BLOCK + "rotary_emb.inv_freq": torch.ones(16),
        },
    )
    model = model_of(start_engine(path))
    update = [("model.transformer.ln_f.weight", torch.full((128,), 2.0))]
    assert model.load_weights(update) == {"model.norm.weight"}
    assert model.model.norm.weight.unique().tolist() == [2.0]
    with pytest.raises(ValueError, match=r"holds .*k_proj.bias"):
        model.load_weights([(LLADA_BLOCK + "k_proj.bias", torch.ones(128))])
