# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Launching a kernel again and again, at the cost of the launch alone."""

from collections.abc import Hashable
from typing import Any

_compiled: dict[Hashable, Any] = {}


def relaunch(
    kernel: Any, grid: tuple[int, int, int], variant: Hashable, *args: Any, num_warps: int = 4
) -> None:
    """Launch a Triton or Gluon kernel.

    Triton looks at every argument each time to find the compiled code that fits, which takes the
    host three times as long as the launch. Here the caller says what that depends on.

    variant: all that the code depends on: device, types, what is None, and numbers that Triton
        specializes on
    args: every argument in its place, constexprs among them
    """
    key = (kernel, variant)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, num_warps=num_warps)
    else:
        compiled[grid](*args)
