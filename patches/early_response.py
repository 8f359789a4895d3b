# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Refuse bad requests to /v1/responses before their stream begins, so that they get HTTP 400."""

import functools
from collections.abc import AsyncGenerator, Callable
from typing import Any

from sparsed_vllm.patches.apply import Patch
from sparsed_vllm.patches.early_refusal import check_now


def _checked_at_once(
    generate: Callable[..., AsyncGenerator[Any, None]],
) -> Callable[..., AsyncGenerator[Any, None]]:
    @functools.wraps(generate)
    def check_and_generate(
        self: Any, request_id: str, engine_input: Any, sampling_params: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        check_now(self.engine_client, engine_input, sampling_params, request_id)
        return generate(self, request_id, engine_input, sampling_params, **kwargs)

    return check_and_generate


_PARAMETERS = (
    "self",
    "request_id",
    "engine_input",
    "sampling_params",
    "context",
    "tok_params",
    "lora_request",
    "priority",
    "trace_headers",
    "session_id",
)

PATCH = Patch(
    target="vllm.entrypoints.openai.responses.serving:"
    "OpenAIServingResponses._generate_with_builtin_tools",
    parameters=(*_PARAMETERS, "reasoning_parser_kwargs"),
    later_parameters=(
        *_PARAMETERS,
        *("data_parallel_rank", "reasoning_parser_kwargs", "reasoning_ended", "max_tool_calls"),
    ),
    wrap=_checked_at_once,
    because="This endpoint asks the engine from inside of its stream, which has answered with HTTP "
    "200 by then; a request that is refused there is cut off without a word.",
    drop_when="vLLM checks a request before it answers that a stream begins.",
)
