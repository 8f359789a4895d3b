# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Which vLLM we run on, and every part of it that we build on."""

import importlib
import inspect
from typing import Any

SUPPORTED = ("0.32", "0.34")
"""Versions of vLLM that are supported: from the first, up to but without the second."""

RANGE = f"vllm>={SUPPORTED[0]},<{SUPPORTED[1]}"
"""The same as a requirement of pip's."""

SEAMS = {
    "vllm.model_executor.models:ModelRegistry.register_model": None,
    "vllm.model_executor.models.config:MODELS_CONFIG_MAP": None,
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": ("self", "throttle_prefills"),
    "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule": ("self", "scheduler_output"),
    "vllm.v1.core.sched.scheduler:Scheduler.finish_requests": (
        "self",
        "request_ids",
        "finished_status",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.pause_state": None,
    "vllm.v1.core.sched.request_queue:create_request_queue": None,
    "vllm.v1.core.sched.request_queue:RequestQueue.remove_requests": ("self", "requests"),
    "vllm.v1.core.sched.request_queue:RequestQueue.prepend_requests": ("self", "requests"),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        "self",
        "scheduler_output",
        "model_runner_output",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._update_request_with_output": (
        "self",
        "request",
        "new_token_ids",
        "is_stale",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": (
        "self",
        "request",
        "delay_free_blocks",
    ),
}
"""Private or young parts of vLLM: what each is, and the parameters it is called with.

None: it only has to exist. Functions that are patched are not here: each patch checks its own.
tests/test_vllm_contract.py holds the rest of the contract.
"""


class Unfit(RuntimeError):
    """This vLLM, or what others made of it, is not what the plugin was written for."""


def why_unsupported(version: str) -> str | None:
    """Why this plugin cannot run on vLLM `version`, or None if it can."""
    lowest, beyond = (_numbers(bound) for bound in SUPPORTED)
    if lowest <= _numbers(version) < beyond:
        return None
    return f"vLLM {version} is not supported; install {RANGE}"


def _numbers(version: str) -> tuple[int, ...]:
    """The leading two numbers of a version: (0, 32) for 0.32.1rc1+cpu."""
    numbers = []
    for part in version.split(".")[:2]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def missing_seams() -> list[str]:
    """What is wrong with the parts of vLLM in SEAMS, one sentence each. Imports them."""
    missing = []
    for seam, parameters in SEAMS.items():
        try:
            locate(seam, *([] if parameters is None else [parameters]))
        except Unfit as difference:
            missing.append(str(difference))
    return missing


def locate(target: str, *signatures: tuple[str, ...]) -> tuple[Any, str, Any]:
    """The owner of `package.module:Owner.attribute`, the attribute's name, and the attribute.

    signatures: the names it may take; without any it only has to exist
    Raises Unfit, which says what differs, whose doing it is, and the remedy.
    """
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        found = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise Unfit(f"this vLLM lacks {target}; install {RANGE}") from error
    if signatures and (taken := _parameters_of(found)) not in signatures:
        difference = f"{target} takes ({', '.join(taken)}) and not ({', '.join(signatures[0])})"
        raise Unfit(f"{difference}{_blame(found, module)}")
    return owner, name, found


def _parameters_of(function: Any) -> tuple[str, ...]:
    """The names it takes; those of what it wraps if it was made by functools.wraps."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not callable, or a builtin that does not tell
        return ("unknown",)


def _blame(found: Any, module: str) -> str:
    """Whose doing a difference is, and the remedy."""
    origin = getattr(found, "__module__", None)
    if origin is None or origin == module:
        return f"; install {RANGE}"
    return (
        f", because {origin} has replaced it; disable that package (VLLM_PLUGINS names the plugins "
        "to load) or have it use functools.wraps"
    )
