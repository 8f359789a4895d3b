# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What a request must look like to be served; checked before it costs anything."""

from collections.abc import Sequence

import msgspec
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from sparsed_vllm.families import FAMILIES, Family
from sparsed_vllm.params import BadRequest, DenoisingParams, parse_params

SERVED_FIELDS = frozenset(
    {
        # what denoising itself reads
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "max_tokens",
        "extra_args",
        # what vLLM does with the tokens it is handed
        "n",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "output_kind",
        "stream_interval",
        "output_text_buffer_length",
        "repetition_detection",
        # requests without a meaning here, harmless as they are
        "skip_clone",
        "skip_reading_prefix_cache",
        "flat_logprobs",
        "watermarking",
    }
)
"""Sampling parameters that are honoured. All others must keep vLLM's default."""

_REMEDIES = {
    "logprobs": "Leave it out, and do without beam search, which asks for it.",
    "structured_outputs": "A grammar is followed left to right, places are not filled so. "
    "Leave out response_format and structured_outputs.",
}


def family_of(model_config: ModelConfig) -> Family:
    """The family of a model that this plugin serves. Raises KeyError for another model."""
    return FAMILIES[model_config.architecture]


def denoising_params(family: Family, params: SamplingParams) -> DenoisingParams:
    """What `params` asks of the denoising. Raises BadRequest."""
    assert params.max_tokens is not None, "vLLM fills it in at admission"
    return parse_params(
        family,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        ignore_eos=params.ignore_eos,
        extra_args=params.extra_args or {},
    )


class RequestRefused(VLLMValidationError, ValueError):
    """vLLM's validation error, which becomes HTTP 400, and the ValueError that Python expects."""

    def __init__(self, error: BadRequest) -> None:
        VLLMValidationError.__init__(self, str(error), parameter=error.field, value=error.value)


def check_request(model_config: ModelConfig, request: EngineCoreRequest) -> None:
    """Refuse a request that cannot be served as it asks.

    Raises RequestRefused, which names field, value, range and remedy.
    """
    try:
        _check_kind(request)
        assert request.sampling_params is not None
        _check_served(request.sampling_params)
        denoising_params(family_of(model_config), request.sampling_params)
        _check_prompt(model_config, request.prompt_token_ids or [], request.sampling_params)
    except BadRequest as error:
        raise RequestRefused(error) from error


def _check_kind(request: EngineCoreRequest) -> None:
    if request.sampling_params is None:
        raise BadRequest("pooling_params", "set", "absent", "These models generate text only.")
    if request.resumable:
        raise BadRequest("resumable", True, "False", "Send each input as a request of its own.")
    if request.prompt_embeds is not None:
        raise BadRequest("prompt_embeds", "set", "absent", "Send token ids or text.")


def _check_served(params: SamplingParams) -> None:
    """Every sampling parameter that denoising does not honour must keep its default."""
    for field in msgspec.structs.fields(SamplingParams):
        if field.name.startswith("_") or field.name in SERVED_FIELDS:
            continue
        value = getattr(params, field.name)
        if value is not None and value != field.default and value != []:
            raise BadRequest(
                field.name,
                value,
                f"absent or {field.default} for a diffusion language model",
                _REMEDIES.get(field.name, "Denoising does not use it; leave it out."),
            )


def _check_prompt(model_config: ModelConfig, prompt: Sequence[int], params: SamplingParams) -> None:
    limit, num_tokens = model_config.max_model_len, params.max_tokens
    assert num_tokens is not None
    if len(prompt) + num_tokens > limit:
        raise BadRequest(
            "max_tokens",
            num_tokens,
            f"at most {limit - len(prompt)} (max_model_len {limit} less {len(prompt)} of prompt)",
            "Shorten the prompt, lower max_tokens or raise --max-model-len.",
        )
    vocab_size = model_config.get_vocab_size()
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < vocab_size:
            raise BadRequest(
                "prompt", f"token {token}", f"of tokens in [0, {vocab_size - 1}]", "Remove it."
            )
    mask = model_config.hf_config.mask_token_id
    if mask in prompt:
        raise BadRequest(
            "prompt",
            f"token {mask} at place {list(prompt).index(mask)}",
            f"free of the mask token {mask}",
            "Only the canvas behind the prompt is filled; remove the mask.",
        )
