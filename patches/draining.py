# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Answer requests that come while a server shuts down with HTTP 503, not with 500."""

import functools
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from sparsed_vllm.families import FAMILIES
from sparsed_vllm.patches.apply import Patch


def _refuse(n: int = 1, request_id: str | None = None) -> None:
    """Stands in for AsyncLLM.check_admission, which every request passes first."""
    from vllm.exceptions import GracefulHTTPError

    message = "This server is shutting down. Please try again later or on a different instance."
    raise GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE)


def _refusing(shutdown: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(shutdown)
    def refuse_and_shutdown(self: Any, timeout: float | None = None) -> None:
        # An engine that failed to start is shut down before it has a model.
        model_config = getattr(self, "model_config", None)
        if getattr(model_config, "architecture", None) in FAMILIES:
            self.check_admission = _refuse
        shutdown(self, timeout)

    return refuse_and_shutdown


PATCH = Patch(
    target="vllm.v1.engine.async_llm:AsyncLLM.shutdown",
    parameters=("self", "timeout"),
    wrap=_refusing,
    because="A server that drains takes requests on, and fails to tokenize them: its threads are "
    "gone.",
    drop_when="vLLM answers requests with HTTP 503 while it drains.",
)
