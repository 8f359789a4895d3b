# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""From which length on sparse steps are worth it, where that was measured."""

MEASURED = {"H100": 8192}
"""Tokens, by a part of the device's name.

benchmarks/crossover.py derives them from benchmarks/results: the length from which sparse steps are
10% faster than dense ones. Less is not worth a recording step and what sparsity leaves out.
"""

UNMEASURED = 8192
"""Tokens, for all other GPUs, and for the CPU: there sparse steps pay sooner, but nobody serves
there, and what a short request leaves out should be its own choice."""


def crossover_on(device_name: str) -> tuple[int, str]:
    """The length for a device and, in words, where it comes from."""
    for part, length in MEASURED.items():
        if part in device_name:
            return length, f"measured on an {part}"
    return UNMEASURED, f"the default for devices that were not measured, as {device_name}"
