# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""FlashAttention is used where vLLM has a version of it for the GPU, and nowhere else."""

import pytest
import torch
from vllm.v1.attention.backends import fa_utils

from sparsed_vllm.flash import flash_attention

chosen = flash_attention.__wrapped__  # without its memory


@pytest.fixture(params=[None, 2, 3])
def version(request, monkeypatch):
    """What vLLM says on an NVIDIA GPU; None: of compute capability 7.5."""
    monkeypatch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: True)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda: request.param)
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", "varlen", raising=False)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_version_that_vllm_names_serves_or_else_our_kernel(version, dtype):
    flash = chosen("cuda", dtype)
    assert (flash and (flash.function, flash.version)) == (version and ("varlen", version))


def test_float32_and_the_cpu_run_our_own(version):
    assert chosen("cuda", torch.float32) is None
    assert chosen("cpu", torch.bfloat16) is None
