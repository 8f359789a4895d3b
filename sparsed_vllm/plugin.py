# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Puts our models, configurations and patches where vLLM looks for them."""

import copyreg
from functools import cache
from typing import Any

import vllm
from vllm.logger import init_logger

from sparsed_vllm.compat import RANGE, Unfit, missing_seams, why_unsupported

logger = init_logger("vllm.sparsed.plugin")


@cache
def install_once() -> None:
    """Register everything, or nothing. Never raises: one ERROR says what does not fit.

    vLLM calls this in every process and for every model, and would end on an exception.
    """
    try:
        _install()
    except Unfit as reason:
        logger.error("sparsed-vllm registers nothing: %s.", reason)
    except Exception as error:
        logger.exception(
            "sparsed-vllm registers nothing, its models are unknown to this vLLM: %s: %s. "
            "Reinstall %s and sparsed-vllm; if that does not help, report this traceback.",
            type(error).__name__,
            error,
            RANGE,
        )


def _install() -> None:
    if reason := why_unsupported(vllm.__version__):
        raise Unfit(reason)
    # Next to what the registration itself imports, the scheduler's module costs 15 ms.
    if missing := missing_seams():
        raise Unfit(", and ".join(missing))
    from sparsed_vllm.patches.apply import apply_all
    from sparsed_vllm.patches.inventory import PATCHES

    take_back = apply_all(PATCHES)
    try:
        _register_backend()
        _register_models()
    except Exception:
        take_back()
        raise


def _register_models() -> None:
    """Configurations and tokenizers first: once an architecture is known, nothing may fail."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils import config as config_readers

    from sparsed_vllm.models.configuration import ForeignConfig
    from sparsed_vllm.models.hook import DenoisingModelConfig
    from sparsed_vllm.models.registry import FOREIGN, MODELS, find_class

    configs: dict[str, Any] = {}  # of models that share a type the first; it finds the others
    for spec in MODELS.values():
        config = find_class(spec.config)
        configs.setdefault(config.model_type, config)
        if spec.tokenizer is not None:
            tokenizer = find_class(spec.tokenizer)
            AutoTokenizer.register(config, fast_tokenizer_class=tokenizer, exist_ok=True)
    for model_type, config in configs.items():
        AutoConfig.register(model_type, config, exist_ok=True)
    for foreign in FOREIGN.values():
        if foreign.model_type not in CONFIG_MAPPING:
            CONFIG_MAPPING.register(foreign.model_type, ForeignConfig)
    # vLLM then reads such a config.json by our class, whatever it says of remote code or lacks.
    types = getattr(config_readers, "_ARCHITECTURE_TO_MODEL_TYPE", {})
    for architecture, spec in MODELS.items():
        types[architecture] = find_class(spec.config).model_type
        ModelRegistry.register_model(architecture, spec.network)
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
