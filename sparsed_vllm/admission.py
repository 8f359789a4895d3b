# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What a request must look like to be served; checked before it costs anything."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral

import msgspec
from vllm.config import ModelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from sparsed_vllm import reuse
from sparsed_vllm.config import REQUEST_FIELDS, SparseConfig, Sparsity, choose_sparsity
from sparsed_vllm.kernels.layout import most_kept, num_blocks
from sparsed_vllm.limits import Limits
from sparsed_vllm.models.registry import MODELS
from sparsed_vllm.params import BadRequest, DenoisingParams, check_periods, parse_params, shown
from sparsed_vllm.reuse import ReuseConfig, choose_reuse
from sparsed_vllm.steps import Plan
from sparsed_vllm.tables import room_of_rows

BACKEND_NAME = "SPARSED"
"""Our attention backend, as vLLM's registry and `--attention-backend` know it."""

SERVED_FIELDS = frozenset(
    {
        # what denoising itself reads
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "max_tokens",
        "min_tokens",
        "logprobs",
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

_INTEGERS = ("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "stream_interval")

_REMEDIES = {
    "prompt_logprobs": "Places are filled from both sides: a prompt has no probability token by "
    "token. Leave it out, or leave out echo, which asks for it beside logprobs.",
    "structured_outputs": "A grammar is followed left to right, places are not filled so. Leave "
    'out response_format and structured_outputs, and use tool_choice "auto" or "none": "required" '
    "and a named tool make a grammar.",
}


class RequestReader:
    """Reads what a request asks of one engine; the same in its front end, scheduler and workers."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.model_config = vllm_config.model_config
        self.family = MODELS[self.model_config.architecture].family
        self.sparse_config = sparse_config_of(vllm_config)
        self.reuse_config = reuse_config_of(vllm_config)
        self.limits = Limits.of(vllm_config.additional_config)

    def plan(self, params: SamplingParams, prompt_len: int) -> Plan:
        """The steps that a request asks for. Raises BadRequest."""
        extra_args = params.extra_args or {}
        denoising = self._denoising(params, extra_args)
        length = prompt_len + denoising.num_tokens
        sparsity = choose_sparsity(self.sparse_config, extra_args, length)
        if denoising.variable_length and sparsity is not None:
            _refuse_tables(extra_args)
            sparsity = None
        plan = Plan(denoising, sparsity, prompt_len, shift=int(self.family.shifts_logits))
        check_periods(extra_args, ("sparsed_refresh",), plan.num_steps)
        if sparsity is not None:
            self._check_table(sparsity, length)
        by_threshold = denoising.threshold is not None
        chosen = choose_reuse(self.reuse_config, extra_args, plan.num_steps, by_threshold)
        return replace(plan, reuse=chosen)

    def _denoising(
        self, params: SamplingParams, extra_args: Mapping[str, object]
    ) -> DenoisingParams:
        assert params.max_tokens is not None, "vLLM fills it in at admission"
        if not isinstance(extra_args, Mapping):
            raise BadRequest("extra_args", extra_args, "a mapping", "Its keys are parameters.")
        self.limits.check_fields(extra_args)
        denoising = parse_params(
            self.family,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            ignore_eos=params.ignore_eos,
            extra_args=extra_args,
            also_known=REQUEST_FIELDS | reuse.REQUEST_FIELDS,
            min_tokens=params.min_tokens,
            stop_tokens=self._stop_tokens(params),
            logprobs=params.logprobs,
            max_steps=self.limits.max_steps,
        )
        self.limits.check_threshold(denoising)
        return denoising

    def _stop_tokens(self, params: SamplingParams) -> list[int]:
        """EOS and the request's own, as far as the model knows them; not all that it knows."""
        vocab_size = self.model_config.get_vocab_size()
        stops = [token for token in params.all_stop_token_ids if 0 <= token < vocab_size]
        mask = self.model_config.hf_config.mask_token_id
        if params.min_tokens and len({*stops, mask}) >= vocab_size:
            raise BadRequest(
                "stop_token_ids",
                f"{len(stops)} tokens",
                "less than the whole vocabulary when min_tokens is set",
                "Leave a token that the text may begin with.",
            )
        return stops

    def _check_table(self, sparsity: Sparsity, length: int) -> None:
        """A request's rows of ids must fit those that its pages have."""
        assert self.sparse_config is not None
        ids = most_kept(num_blocks(length, sparsity.block_size), sparsity.select)
        limit, tile = self.sparse_config.table_ids, sparsity.tile
        if ids > room_of_rows(limit, tile):
            raise BadRequest(
                "sparsed_block_size",
                sparsity.block_size,
                f"large enough to keep less than {limit} key blocks a token: with select "
                f"{sparsity.select} and {length} tokens it may keep {ids} for {tile} tokens",
                "Use larger blocks, a larger sparsed_query_block_size or a smaller sparsed_select, "
                "or raise sparsed.table_ids.",
            )


def _refuse_tables(extra_args: Mapping[str, object]) -> None:
    """A table, recorded once, has no rows for blocks to come. Raises BadRequest if one is asked."""
    for name in REQUEST_FIELDS:
        if name in extra_args:
            raise BadRequest(
                name,
                extra_args[name],
                "absent when variable_length is set",
                "A canvas that grows runs dense: its table would lack the blocks to come.",
            )


def sparse_config_of(vllm_config: VllmConfig) -> SparseConfig | None:
    """The engine's settings for sparse attention; None if the user named another backend."""
    backend = vllm_config.attention_config.backend
    if backend is not None and backend.name != BACKEND_NAME:
        return None
    return SparseConfig.of(vllm_config.additional_config)


def reuse_config_of(vllm_config: VllmConfig) -> ReuseConfig | None:
    """The engine's settings for reuse; None if it has none, or the user named another backend."""
    if sparse_config_of(vllm_config) is None:
        return None
    return ReuseConfig.of(vllm_config.additional_config)


class RequestRefused(VLLMValidationError, ValueError):
    """vLLM's validation error, which becomes HTTP 400, and the ValueError that Python expects."""

    def __init__(self, error: BadRequest) -> None:
        VLLMValidationError.__init__(
            self, str(error), parameter=error.field, value=shown(error.value)
        )


def check_request(
    vllm_config: VllmConfig, request: EngineCoreRequest, asked: SamplingParams | PoolingParams
) -> None:
    """Refuse a request that cannot be served as it asks.

    asked: its parameters before vLLM filled in what they leave open
    Raises RequestRefused, which names field, value, range and remedy.
    """
    try:
        _check_kind(request, asked)
        assert request.sampling_params is not None and isinstance(asked, SamplingParams)
        _check_served(request.sampling_params)
        prompt = request.prompt_token_ids or []
        reader = RequestReader(vllm_config)
        # First the length: what is read afterwards takes time in proportion to it.
        _settle_length(reader, request.sampling_params, asked)
        _check_prompt(reader.model_config, prompt, request.sampling_params)
        reader.plan(request.sampling_params, len(prompt))
    except BadRequest as error:
        raise RequestRefused(error) from error


def _check_kind(request: EngineCoreRequest, asked: SamplingParams | PoolingParams) -> None:
    if not isinstance(asked, SamplingParams):
        raise BadRequest("pooling_params", "set", "absent", "These models generate text only.")
    if _is_beam(asked):
        allowed = "absent: a beam grows left to right, places are not filled so"
        raise BadRequest("beam search", "a beam", allowed, "Use n and a temperature for samples.")
    if request.resumable:
        raise BadRequest("resumable", True, "False", "Send each input as a request of its own.")
    if request.prompt_embeds is not None:
        raise BadRequest("prompt_embeds", "set", "absent", "Send token ids or text.")


def _is_beam(params: SamplingParams) -> bool:
    """Whether vLLM's beam search made the request, one for each token of each beam.

    Nothing says so, but this is what they hold, and nobody else is likely to ask for it.
    """
    lone = params.max_tokens == 1 and not params.detokenize and params.watermarking is False
    return lone and (params.logprobs or 0) > 1


def _check_types(params: SamplingParams) -> None:
    """What Python's SamplingParams lets through, but the engine cannot be sent."""
    for name in _INTEGERS:
        value = getattr(params, name)
        if value is None:
            continue
        if not isinstance(value, Integral) or not -(2**63) <= int(value) < 2**63:
            raise BadRequest(name, value, "an integer of 64 bits", "Leave it out.")
    for stop in params.stop or ():
        if stop.encode(errors="ignore").decode() != stop:
            raise BadRequest("stop", stop, "text", "Remove the half of a surrogate pair.")


def _check_served(params: SamplingParams) -> None:
    """Every sampling parameter that denoising does not honour must keep its default."""
    _check_types(params)
    for field in msgspec.structs.fields(SamplingParams):
        if field.name.startswith("_") or field.name in SERVED_FIELDS:
            continue
        value = getattr(params, field.name)
        if value is not None and value != field.default and value not in ([], {}, ()):
            raise BadRequest(
                field.name,
                "a grammar" if field.name == "structured_outputs" else value,
                f"absent or {field.default} for a diffusion language model",
                _REMEDIES.get(field.name, "Denoising does not use it; leave it out."),
            )


def _settle_length(reader: RequestReader, params: SamplingParams, asked: SamplingParams) -> None:
    """Make the canvas as long as asked for, or as the default where `asked` leaves it open."""
    assert params.max_tokens is not None, "vLLM filled in what is left of the context"
    if asked.max_tokens is None:
        default = reader.model_config.hf_config.default_max_tokens
        params.max_tokens = min(default, params.max_tokens)
    reader.limits.check_length(params.max_tokens)


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
