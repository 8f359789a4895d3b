# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Whether the network computes what config.json, with its overrides, says."""

from transformers import PretrainedConfig
from vllm.config import ModelConfig
from vllm.logger import init_logger

from sparsed_vllm.models.checkpoint_files import check_tokenizer
from sparsed_vllm.models.configuration import DenoisingConfig
from sparsed_vllm.models.registry import FOREIGN, MODELS, find_class
from sparsed_vllm.models.weights_format import check_format

logger = init_logger("vllm.sparsed.config")

_OVERRIDABLE = frozenset(
    {"architectures", "dtype", "head_dim", "model_type", "quantization_config"}
)
"""Keys of any model's config.json whose override takes effect, or is refused."""

_READ_FROM_FILES = frozenset({"eos_token_id", "pad_token_id"})
"""What vLLM takes from generation_config.json or config.json, and never from an override."""


def check_config(model: ModelConfig) -> None:
    """Raise ValueError for what config.json, or an override of it, says and we do not compute."""
    if model.architecture not in MODELS:  # vLLM takes X...ForY for XModel
        foreign = FOREIGN.get(model.architecture)
        known = f"{model.architecture} is no model of sparsed-vllm, which has {', '.join(MODELS)}"
        raise ValueError(foreign.refusal() if foreign else f"{known}.")
    config, expected = model.hf_config, find_class(MODELS[model.architecture].config)
    if type(config) is not expected or config.model_type != expected.model_type:
        raise ValueError(
            f"{model.architecture} needs the {expected.__name__} of sparsed-vllm (model_type "
            f"{expected.model_type}), got {type(config).__name__} ({config.model_type}): leave "
            "model_type and architectures out of --hf-overrides, and write them into config.json."
        )
    _refuse_overrides(model, config)
    check_format(vars(config))  # of overrides that are mappings, vLLM asks us nothing
    if not model.skip_tokenizer_init:
        check_tokenizer(model.tokenizer)
    if refusals := list(config.refusals()):
        raise ValueError(f"{model.model}'s config.json is not served: {'; '.join(refusals)}.")
    if model.max_model_len > config.positions:
        raise ValueError(
            f"--max-model-len {model.max_model_len} is beyond the {config.positions:.0f} positions "
            "of the model's rotary embedding. Lower it, or scale the embedding (docs/models.md)."
        )
    _name_unknown_keys(config)


def check_sharing(config: DenoisingConfig, ranks: int) -> None:
    """Raise ValueError for sizes that --tensor-parallel-size `ranks` cannot share out evenly."""
    name = config.attribute_map
    kv_heads, inner = config.num_key_value_heads, config.intermediate_size
    uneven = {"intermediate_size": (inner, inner % ranks)}
    uneven["num_key_value_heads"] = (kv_heads, max(kv_heads, ranks) % min(kv_heads, ranks))
    for key, (size, rest) in uneven.items():
        if rest:
            raise ValueError(
                f"--tensor-parallel-size {ranks} cannot share {name.get(key, key)}: {size} evenly. "
                "Choose one that can."
            )


def _refuse_overrides(model: ModelConfig, config: DenoisingConfig) -> None:
    """An override that nothing reads would be swallowed."""
    if not isinstance(model.hf_overrides, dict):
        return
    known = (config.known_keys() | _OVERRIDABLE) - _READ_FROM_FILES
    for key in model.hf_overrides:
        if settled := config.settled.get(key):
            raise ValueError(
                f"--hf-overrides sets {key}, which is read from config.json only: set {settled}."
            )
        if key not in known:
            raise ValueError(
                f"--hf-overrides sets {key}, which changes nothing for {model.architecture}. It "
                f"may set {', '.join(sorted(known))}."
            )


def _name_unknown_keys(config: DenoisingConfig) -> None:
    """But for those that transformers writes for every model."""
    if unknown := sorted(config.unread.keys() - PretrainedConfig().to_dict().keys()):
        logger.warning(
            "config.json has keys that %s does not know, and nothing here reads: %s.",
            type(config).__name__,
            ", ".join(unknown),
        )
