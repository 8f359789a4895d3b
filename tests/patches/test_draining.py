# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A server with early_errors that shuts down refuses; others do what vLLM does."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm.exceptions import GracefulHTTPError

from sparsed_vllm.patches.draining import PATCH


def config(architecture, **denoising):
    """An engine's configuration, as far as the patch reads it."""
    return SimpleNamespace(
        model_config=SimpleNamespace(architecture=architecture),
        additional_config={"denoising": denoising},
    )


def shut_down(**engine):
    """An engine after its shutdown, which saw the timeout."""
    engine = SimpleNamespace(check_admission=lambda n: "admitted", **engine)
    PATCH.wrap(lambda self, timeout: vars(self).update(timeout=timeout))(engine, timeout=60)
    assert engine.timeout == 60
    return engine


def test_an_engine_with_early_errors_refuses_from_its_shutdown_on():
    engine = shut_down(vllm_config=config("DreamModel", early_errors=1))
    with pytest.raises(GracefulHTTPError) as refused:
        engine.check_admission(1)
    assert refused.value.http_status == 503


def test_other_engines_and_those_that_failed_to_start_are_left_alone():
    plain = shut_down(vllm_config=config("DreamModel"))
    other = shut_down(vllm_config=config("LlamaForCausalLM", early_errors=1))
    failed = shut_down()
    assert [engine.check_admission(1) for engine in (plain, other, failed)] == ["admitted"] * 3


def test_requests_that_have_not_ended_in_time_are_answered():
    async def wait():
        loop, told = asyncio.get_running_loop(), []
        await loop.run_in_executor(
            None,
            lambda: shut_down(
                vllm_config=config("DreamModel", early_errors=1),
                output_handler=SimpleNamespace(get_loop=lambda: loop),
                output_processor=SimpleNamespace(propagate_error=told.append),
            ),
        )
        return told

    (error,) = asyncio.run(wait())
    assert error.http_status == 503
