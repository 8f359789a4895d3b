# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Quantized checkpoints of the small trained model answer as the model itself does."""

import json

import pytest
import torch
from checkpoints import write_dream, write_llada_moe
from engines import start_engine
from needle.checkpoint import SHIPPED
from quality.answers import Engine
from quality.methods import METHODS
from quality.questions import draw, mark
from quantized import quantize_int4, quantize_int8
from vllm import SamplingParams
from vllm import _custom_ops as ops
from vllm.model_executor.layers.quantization.online.fp8 import Fp8PtpcOnlineLinearMethod

pytestmark = pytest.mark.engine
on_a_processor = pytest.mark.skipif(
    torch.cuda.is_available(), reason="for a GPU vLLM itself picks kernels that run"
)

SIZES = {"canvas": 32, "steps": 16, "block_size": 16}
KEPT = ("blocks.0.ff_out", "blocks.3.ff_proj", "blocks.3.up_proj")  # not quantized


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    kept = [f"model.transformer.{name}" for name in KEPT]
    path = quantize_int8(SHIPPED, tmp_path_factory.mktemp("int8") / "model", kept=kept)
    # On a processor with AMX the kernel takes no float32.
    return start_engine(path, max_model_len=512, dtype="bfloat16")


@pytest.fixture(scope="module")
def int4_path(tmp_path_factory):
    return quantize_int4(SHIPPED, tmp_path_factory.mktemp("int4") / "model", group_size=128)


@pytest.fixture(scope="module")
def int4(int4_path):
    """An engine, or where vLLM's library for this processor lacks the kernel, its refusal."""
    if torch.cuda.is_available() or hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return start_engine(int4_path, max_model_len=512, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"CompressedTensorsWNA16.*cpu_gemm_wna16") as refusal:
        start_engine(int4_path, max_model_len=512, dtype="bfloat16")
    return pytest.skip(f"refused at the start, so nothing to ask: {refusal.value}")


def linears_of(llm):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    model = worker.model_runner.model
    linears = {name: m for name, m in model.named_modules() if name.endswith(("proj", "head"))}
    assert len(linears) == 8 * 4 + 1
    return linears


def test_the_linears_are_in_int8_but_for_those_that_the_checkpoint_names(int8):
    linears = linears_of(int8)
    # vLLM's kernel packs int8 weights away.
    wide = {
        name for name, m in linears.items() if m.weight is not None and m.weight.is_floating_point()
    }
    assert wide == {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.3.mlp.gate_up_proj"}


def test_weights_alone_are_in_int4_but_for_the_head_s(int4):
    linears = linears_of(int4)
    assert linears.pop("lm_head").weight.dtype == torch.bfloat16
    for name, linear in linears.items():
        assert not linear.weight_packed.is_floating_point(), name
        assert linear.scheme.__class__.__name__ == "CompressedTensorsWNA16", name


@on_a_processor
def test_a_scheme_whose_kernel_this_machine_lacks_is_refused_at_the_start(int4_path, monkeypatch):
    def absent(*args, **kwargs):
        raise AttributeError("'_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'")

    for kernel in ("cpu_gemm_wna16", "int4_scaled_mm_cpu"):  # the latter with AMX
        monkeypatch.setattr(ops, kernel, absent)
    with pytest.raises(ValueError, match=r"CompressedTensorsWNA16 .* this processor .*wna16.* Use"):
        start_engine(int4_path, max_model_len=512, dtype="bfloat16")


BY_CHANNEL = "int8_per_channel_weight_only"


@on_a_processor
def test_experts_without_a_kernel_are_refused_with_a_remedy_that_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # as AVX2 has none
    path = write_llada_moe(tmp_path, mlp_hidden_size=64)
    with pytest.raises(ValueError, match=f"{BY_CHANNEL} does not run .* this processor") as refusal:
        start_engine(path, dtype="bfloat16", quantization=BY_CHANNEL)
    remedy = {"linear": "fp8_per_channel"}
    assert f"--quantization online --quantization-config '{json.dumps(remedy)}'" in str(
        refusal.value
    )
    llm = start_engine(
        path, dtype="bfloat16", quantization="online", quantization_config=remedy, max_model_len=64
    )
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 8


@pytest.mark.parametrize("write", [write_dream, write_llada_moe])
def test_a_kernel_that_quantizes_as_weights_load_is_missed_by_name(tmp_path, monkeypatch, write):
    def absent(*args, **kwargs):
        raise RuntimeError("_C has no scaled_fp8_quant")

    monkeypatch.setattr(ops, "scaled_fp8_quant", absent)
    path = write(tmp_path, mlp_hidden_size=64)
    args = {"quantization": "online", "quantization_config": {"linear": "fp8_per_tensor"}}
    with pytest.raises(ValueError, match=r"quantization online does not run .* scaled_fp8_quant"):
        start_engine(path, dtype="bfloat16", **args)


@on_a_processor
def test_a_quantized_layer_is_tried_with_its_bias(tmp_path, monkeypatch):
    apply = Fp8PtpcOnlineLinearMethod.apply

    def apply_without(self, layer, x, bias=None):
        if bias is not None:
            raise RuntimeError("expected scalar type Float but found BFloat16")
        return apply(self, layer, x, bias)

    monkeypatch.setattr(Fp8PtpcOnlineLinearMethod, "apply", apply_without)
    with pytest.raises(ValueError, match=r"of model.layers.0.self_attn.qkv_proj does not run"):
        start_engine(write_dream(tmp_path), dtype="bfloat16", quantization="fp8_per_channel")


@pytest.mark.parametrize("method", ["dense", "sparsed-0.3"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_needles_that_the_model_finds_are_found(request, needle, scheme, method):
    quantized = request.getfixturevalue(scheme)
    questions = [draw(task, 200, 32, i) for task in ("single", "multikey") for i in range(2)]
    for llm in (needle, quantized):
        given, _ = Engine(llm, **SIZES).answer(METHODS[method], questions)
        assert all(mark(q, tokens).exact for q, tokens in zip(questions, given, strict=True))
