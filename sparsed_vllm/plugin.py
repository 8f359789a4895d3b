# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Puts our models, configurations and patches where vLLM looks for them."""

import copyreg
from functools import cache
from typing import Any

import vllm
from vllm.logger import init_logger

from sparsed_vllm.compat import why_unsupported

logger = init_logger("vllm.sparsed.plugin")


@cache
def install_once() -> None:
    """Register everything, or nothing if this vLLM is not supported."""
    if reason := why_unsupported(vllm.__version__):
        logger.error("sparsed-vllm registers nothing: %s.", reason)
        return
    from transformers import AutoConfig, AutoTokenizer
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from sparsed_vllm.models import ARCHITECTURES
    from sparsed_vllm.models.configuration import DreamConfig, LLaDAConfig
    from sparsed_vllm.models.hook import DenoisingModelConfig
    from sparsed_vllm.models.tokenizer import DreamTokenizer
    from sparsed_vllm.patches.apply import apply_all
    from sparsed_vllm.patches.inventory import PATCHES

    apply_all(PATCHES)
    _register_backend()
    for config in (LLaDAConfig, DreamConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoTokenizer.register(DreamConfig, fast_tokenizer_class=DreamTokenizer, exist_ok=True)
    for architecture, path in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, path)
        MODELS_CONFIG_MAP[architecture] = DenoisingModelConfig


def _register_backend() -> None:
    """Make `--attention-backend sparsed` known, also to processes that unpickle it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from sparsed_vllm.admission import BACKEND_NAME
    from sparsed_vllm.attention import load_backend

    load_backend()

    def reduce(member: AttentionBackendEnum) -> tuple[Any, ...]:
        if member.name == BACKEND_NAME:
            return load_backend, (member.name,)
        return type(member), (member.value,)

    copyreg.pickle(AttentionBackendEnum, reduce)
