# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The machine that a benchmark runs on: its name, its clock, its memory. Needs torch alone."""

import os
from collections.abc import Callable

import torch
from budget import note


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {len(os.sched_getaffinity(0))} cores"


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """The most that tensors took since forget_peak(): weights, pages and activations."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def guarded(call: Callable[[], None], length: int) -> None:
    """A length that does not fit is a result too, and the others go on."""
    try:
        call()
    except torch.OutOfMemoryError as error:
        note(f"{length} tokens do not fit: {' '.join(str(error).split()):.200}")
        torch.cuda.empty_cache()
