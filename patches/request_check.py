# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Refuse bad requests at admission, with their prompt and all defaults at hand."""

import functools
from collections.abc import Callable
from typing import Any

from vllm.v1.engine import EngineCoreRequest

from sparsed_vllm.models.registry import MODELS
from sparsed_vllm.patches.apply import Patch


def _checked(process_inputs: Callable[..., EngineCoreRequest]) -> Callable[..., EngineCoreRequest]:
    @functools.wraps(process_inputs)
    def process_and_check(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> EngineCoreRequest:
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        if self.model_config.architecture in MODELS:
            from sparsed_vllm.admission import check_request

            check_request(self.vllm_config, request, params)
        return request

    return process_and_check


PATCH = Patch(
    target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    parameters=(
        "self",
        "request_id",
        "prompt",
        "params",
        "supported_tasks",
        "arrival_time",
        "lora_request",
        "tokenization_kwargs",
        "trace_headers",
        "priority",
        "data_parallel_rank",
        "resumable",
        "session_id",
        "kv_hints",
    ),
    wrap=_checked,
    because="LogitsProcessor.validate_params sees the sampling parameters, but neither the prompt "
    "(a mask token in it; prompt + max_tokens over max_model_len) nor the model's configuration.",
    drop_when="vLLM lets a model check its requests in the front end, prompt included.",
)
