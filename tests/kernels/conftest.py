# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Runs Triton in its interpreter where there is no GPU."""

import os
from importlib.metadata import entry_points

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


@pytest.fixture(autouse=True, scope="session")
def interpreter_that_multiplies_bf16():
    """Triton's interpreter multiplies matrices of bf16 as if their bits were integers."""
    if torch.cuda.is_available():
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    published = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        wide = (self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return published(self, *wide, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """vLLM's processes load this plugin themselves. There is none where there is a GPU."""
    for plugin in entry_points(group="vllm.general_plugins", name="quick_interpreter"):
        plugin.load()()
