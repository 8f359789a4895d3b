# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Quantized checkpoints of the small trained model answer as the model itself does."""

import pytest
import torch
from engines import start_engine
from needle.checkpoint import SHIPPED
from quality.answers import Engine
from quality.methods import METHODS
from quality.questions import draw, mark
from quantized import quantize_int4, quantize_int8
from vllm import _custom_ops as ops

pytestmark = pytest.mark.engine

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
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
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


def test_a_scheme_whose_kernel_this_machine_lacks_is_refused_at_the_start(int4_path, monkeypatch):
    def absent(*args, **kwargs):
        raise AttributeError("'_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'")

    for kernel in ("cpu_gemm_wna16", "int4_scaled_mm_cpu"):  # the latter with AMX
        monkeypatch.setattr(ops, kernel, absent)
    with pytest.raises(ValueError, match=r"CompressedTensorsWNA16 .* this processor .*wna16.* Use"):
        start_engine(int4_path, max_model_len=512, dtype="bfloat16")


@pytest.mark.parametrize("method", ["dense", "sparsed-0.3"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_needles_that_the_model_finds_are_found(request, needle, scheme, method):
    quantized = request.getfixturevalue(scheme)
    questions = [draw(task, 200, 32, i) for task in ("single", "multikey") for i in range(2)]
    for llm in (needle, quantized):
        given, _ = Engine(llm, **SIZES).answer(METHODS[method], questions)
        assert all(mark(q, tokens).exact for q, tokens in zip(questions, given, strict=True))
