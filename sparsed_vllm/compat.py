# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Which vLLM we run on, and every part of it that we build on."""

import importlib
import inspect

SUPPORTED = ("0.32", "0.34")
"""Versions of vLLM that are supported: from the first, up to but without the second."""

SEAMS = {
    "vllm.model_executor.models:ModelRegistry.register_model": None,
    "vllm.model_executor.models.config:MODELS_CONFIG_MAP": None,
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": ("request",),
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": ("throttle_prefills",),
    "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule": ("scheduler_output",),
    "vllm.v1.core.sched.scheduler:Scheduler.finish_requests": ("request_ids", "finished_status"),
    "vllm.v1.core.sched.scheduler:Scheduler.pause_state": None,
    "vllm.v1.core.sched.request_queue:create_request_queue": None,
    "vllm.v1.core.sched.request_queue:RequestQueue.remove_requests": ("requests",),
    "vllm.v1.core.sched.request_queue:RequestQueue.prepend_requests": ("requests",),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        "scheduler_output",
        "model_runner_output",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._update_request_with_output": (
        "request",
        "new_token_ids",
        "is_stale",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": ("request", "delay_free_blocks"),
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": None,
    "vllm.v1.engine.async_llm:AsyncLLM.check_admission": ("n", "request_id"),
    "vllm.v1.engine.async_llm:AsyncLLM.generate": None,
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown": None,
    "vllm.v1.engine.output_processor:OutputProcessor.propagate_error": ("e",),
    "vllm.v1.metrics.loggers:StatLoggerManager.__init__": None,
}
"""Private or young parts of vLLM: what each is, and the parameters it is called with.

None: it only has to exist. tests/test_vllm_contract.py holds the rest of the contract.
"""


def why_unsupported(version: str) -> str | None:
    """Why this plugin cannot run on vLLM `version`, or None if it can."""
    lowest, beyond = (_numbers(bound) for bound in SUPPORTED)
    if lowest <= _numbers(version) < beyond:
        return None
    return f"vLLM {version} is not supported; install vllm>={SUPPORTED[0]},<{SUPPORTED[1]}"


def _numbers(version: str) -> tuple[int, ...]:
    """The leading two numbers of a version: (0, 32) for 0.32.1rc1+cpu."""
    numbers = []
    for part in version.split(".")[:2]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def missing_seams() -> list[str]:
    """The parts of vLLM in SEAMS that are absent, or take other parameters. Imports them."""
    return [seam for seam, parameters in SEAMS.items() if not _has(seam, parameters)]


def _has(seam: str, parameters: tuple[str, ...] | None) -> bool:
    module, _, path = seam.partition(":")
    try:
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return False
    if parameters is None:
        return True
    return tuple(inspect.signature(found).parameters)[1:] == parameters  # type: ignore[arg-type]
