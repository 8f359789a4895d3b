# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Answer requests that come too late for a server that shuts down with HTTP 503."""

import functools
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from sparsed_vllm.limits import wants_early_errors
from sparsed_vllm.patches.apply import Patch


def _shutting_down() -> Exception:
    from vllm.exceptions import GracefulHTTPError

    message = "This server is shutting down. Please try again later or on a different instance."
    return GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE)


def _refuse(n: int = 1, request_id: str | None = None) -> None:
    """Stands in for AsyncLLM.check_admission, which every request passes first."""
    raise _shutting_down()


def _end_unfinished(engine: Any) -> None:
    """Tell those who still wait for an engine that is gone: else they, and the server, wait on."""
    if (handler := getattr(engine, "output_handler", None)) is None:
        return  # No request ever came.
    loop = handler.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(engine.output_processor.propagate_error, _shutting_down())


def _refusing(shutdown: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(shutdown)
    def refuse_and_shutdown(self: Any, timeout: float | None = None) -> None:
        # An engine that failed to start is shut down before it has a configuration.
        vllm_config = getattr(self, "vllm_config", None)
        refuses = vllm_config is not None and wants_early_errors(vllm_config)
        if refuses:
            self.check_admission = _refuse
        shutdown(self, timeout)
        if refuses:
            _end_unfinished(self)

    return refuse_and_shutdown


PATCH = Patch(
    target="vllm.v1.engine.async_llm:AsyncLLM.shutdown",
    parameters=("self", "timeout"),
    wrap=_refusing,
    because="A server that drains takes requests on and fails to tokenize them, its threads being "
    "gone; those that have not ended in time are never answered, and keep it alive.",
    drop_when="vLLM answers both with an error.",
)
