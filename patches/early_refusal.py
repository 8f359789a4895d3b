# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Refuse bad requests before their stream begins, so that they get HTTP 400 there too."""

import functools
from collections.abc import AsyncGenerator, Callable
from typing import Any

from sparsed_vllm.limits import wants_early_errors
from sparsed_vllm.patches.apply import Patch


def check_now(engine: Any, prompt: Any, sampling_params: Any, request_id: str) -> None:
    """Raises what an AsyncLLM will raise with the first step of this request's generator.

    Where early_errors is set, and not of prompts that are yet to be tokenized.
    """
    is_rendered = isinstance(prompt, dict) and "type" in prompt
    if is_rendered and wants_early_errors(engine.vllm_config):
        engine.input_processor.process_inputs(
            request_id, prompt, sampling_params, supported_tasks=("generate",)
        )


def _checked_at_once(
    generate: Callable[..., AsyncGenerator[Any, None]],
) -> Callable[..., AsyncGenerator[Any, None]]:
    @functools.wraps(generate)
    def check_and_generate(
        self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        check_now(self, prompt, sampling_params, request_id)
        return generate(self, prompt, sampling_params, request_id, **kwargs)

    return check_and_generate


PATCH = Patch(
    target="vllm.v1.engine.async_llm:AsyncLLM.generate",
    parameters=(
        "self",
        "prompt",
        "sampling_params",
        "request_id",
        "prompt_text",
        "lora_request",
        "tokenization_kwargs",
        "trace_headers",
        "priority",
        "data_parallel_rank",
        "session_id",
        "kv_hints",
        "reasoning_ended",
        "reasoning_parser_kwargs",
    ),
    wrap=_checked_at_once,
    because="A request is looked at when its generator is first asked, and a stream has answered "
    "with HTTP 200 by then.",
    drop_when="vLLM checks a request before it answers that a stream begins.",
)
