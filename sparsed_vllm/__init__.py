# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""vLLM plugin that serves full-attention diffusion language models: LLaDA, Dream and their kin."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_HERE = Path(__file__).parent
if not (_HERE / "kernels").exists():
    # A checkout, in which kernels/ and patches/ stand beside this folder. Python finds it before
    # an installed package if it is started there, as vLLM starts the processes that look at models.
    __path__.append(str(_HERE.parent))

try:
    __version__ = version("sparsed-vllm")
except PackageNotFoundError:  # a bare checkout
    __version__ = "unknown"


def register() -> None:
    """Entry point `vllm.general_plugins`: teach vLLM our models. Call it as often as you like.

    On a vLLM that we do not support it logs one error and changes nothing.
    """
    from sparsed_vllm.plugin import install_once

    install_once()
