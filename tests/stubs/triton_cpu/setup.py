# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Development only: a Triton backend named `cpu`, so that vLLM's CPU worker accepts Triton."""

from setuptools import setup

setup(
    name="triton-cpu-stub",
    version="0.3.0",
    description="A Triton backend named cpu that runs kernels in Triton's interpreter",
    python_requires=">=3.10",
    packages=["triton_cpu_stub"],
    entry_points={
        "triton.backends": ["cpu = triton_cpu_stub"],
        "vllm.general_plugins": ["quick_interpreter = triton_cpu_stub.interpreter:quicken"],
    },
)
