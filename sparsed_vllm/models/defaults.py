# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What requests get that leave a sampling parameter open, settled when the engine starts."""

from collections.abc import Mapping
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger

from sparsed_vllm.families import Family
from sparsed_vllm.limits import Limits
from sparsed_vllm.models.registry import MODELS
from sparsed_vllm.params import BadRequest, parse_params, request_fields

logger = init_logger("vllm.sparsed.config")

_PENALTIES = {
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "min_p": (0,),
}
_TRUNCATION = {"top_p": (1,), "top_k": (0, -1)}
"""Parameters that denoising, or a family's sampler, does not use -> values that mean "off"."""


def settle_defaults(vllm_config: VllmConfig) -> None:
    """Make vLLM's defaults for requests ones that every request may have.

    A client is told what it may not ask for; what a file asks for in its place is told here.
    Raises ValueError for a default that no request could be served with.
    """
    model = vllm_config.model_config
    family = MODELS[model.architecture].family
    in_file = {} if model.generation_config == "vllm" else _read(model)
    unused = _PENALTIES if family.truncates else {**_PENALTIES, **_TRUNCATION}
    _refuse_unused(unused, model.override_generation_config, family)
    _drop_unused(unused, in_file, model, family)
    _name_ignored(in_file, _source(model), family)
    if model.generation_config != "vllm" and in_file.get("temperature") is None:
        # OpenAI's 1.0 is wrong for these models.
        model.override_generation_config.setdefault("temperature", 0.0)
    defaults = model.get_diff_sampling_param()
    _check(defaults, _source(model), family)
    _check_ends(in_file.get("eos_token_id"), _source(model))
    limits = Limits.of(vllm_config.additional_config)
    # patches/default_length.py hands it out.
    model.hf_config.default_max_tokens = limits.default_length(defaults.get("max_tokens"))


def _read(model: ModelConfig) -> dict[str, Any]:
    """What the file says. Raises ValueError for one that transformers cannot read."""
    try:
        content: dict[str, Any] = model.try_get_generation_config()
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_source(model)} cannot be read: {error}. Correct or remove the file, or leave it "
            "unread with --generation-config vllm."
        ) from error
    return content


def _source(model: ModelConfig) -> str:
    """The file that generation defaults are read from, as an operator knows it."""
    is_own = model.generation_config in ("auto", "vllm")
    return "generation_config.json" if is_own else f"--generation-config {model.generation_config}"


def _refuse_unused(
    unused: Mapping[str, tuple[Any, ...]], overrides: Mapping[str, Any], family: Family
) -> None:
    for name, neutral in unused.items():
        if overrides.get(name) not in (None, *neutral):
            raise ValueError(
                f"--override-generation-config sets {name} to {overrides[name]!r}, which a "
                f"{family.name} model's denoising does not use: leave it out."
            )


def _drop_unused(
    unused: Mapping[str, tuple[Any, ...]],
    in_file: Mapping[str, Any],
    model: ModelConfig,
    family: Family,
) -> None:
    dropped = {
        name: in_file[name]
        for name, neutral in unused.items()
        if in_file.get(name) not in (None, *neutral)
    }
    for name in dropped:
        model.override_generation_config[name] = None  # vLLM then has no default for it
    if dropped:
        logger.warning(
            "%s asks for %s, which a %s model's denoising does not use: requests go without.",
            _source(model),
            _shown(dropped),
            family.name,
        )


def _name_ignored(in_file: Mapping[str, Any], source: str, family: Family) -> None:
    """Say which of the authors' own settings are not taken from the file."""
    fields = request_fields(family, 1)
    ignored = {name: in_file[name] for name in fields if in_file.get(name) is not None}
    if ignored:
        logger.info(
            "%s has %s: requests that want them send them, there are no defaults for these.",
            source,
            _shown(ignored),
        )


def _check(defaults: Mapping[str, Any], source: str, family: Family) -> None:
    """Refuse defaults that would end every request that leaves them open with an error."""
    length = defaults.get("max_tokens", 1)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"{source}: max_new_tokens must be an integer over 0, got {length!r}.")
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    given: dict[str, Any] = {**neutral, **{k: v for k, v in defaults.items() if k in neutral}}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{source}: {name} must be a number, got {value!r}.")
    try:
        parse_params(family, max_tokens=length, ignore_eos=False, extra_args={}, **given)
    except BadRequest as error:
        raise ValueError(f"{source}, or --override-generation-config: {error}") from error


def _check_ends(tokens: Any, source: str) -> None:
    for token in tokens if isinstance(tokens, list) else [tokens]:
        if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
            raise ValueError(f"{source}: eos_token_id must be tokens, got {token!r}.")


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value!r}" for name, value in settings.items())
