# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A server of our models that shuts down refuses; others do what vLLM does."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm.exceptions import GracefulHTTPError

from sparsed_vllm.patches.draining import PATCH


def shut_down(**engine):
    """An engine after its shutdown, which saw the timeout."""
    engine = SimpleNamespace(check_admission=lambda n: "admitted", **engine)
    PATCH.wrap(lambda self, timeout: vars(self).update(timeout=timeout))(engine, timeout=60)
    assert engine.timeout == 60
    return engine


def test_our_models_refuse_from_their_shutdown_on():
    engine = shut_down(model_config=SimpleNamespace(architecture="DreamModel"))
    with pytest.raises(GracefulHTTPError) as refused:
        engine.check_admission(1)
    assert refused.value.http_status == 503


def test_other_models_and_engines_that_failed_to_start_are_left_alone():
    other = shut_down(model_config=SimpleNamespace(architecture="LlamaForCausalLM"))
    assert other.check_admission(1) == shut_down().check_admission(1) == "admitted"


def test_requests_that_have_not_ended_in_time_are_answered():
    async def wait():
        loop, told = asyncio.get_running_loop(), []
        await loop.run_in_executor(
            None,
            lambda: shut_down(
                model_config=SimpleNamespace(architecture="DreamModel"),
                output_handler=SimpleNamespace(get_loop=lambda: loop),
                output_processor=SimpleNamespace(propagate_error=told.append),
            ),
        )
        return told

    (error,) = asyncio.run(wait())
    assert error.http_status == 503
