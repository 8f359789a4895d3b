# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Installs patches: all of them, or none if a target is not what its patch was written for."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from sparsed_vllm.compat import locate


@dataclass(frozen=True)
class Patch:
    """One replaced function of vLLM."""

    target: str  # "package.module:Owner.attribute"
    parameters: tuple[str, ...]  # the names it is called with
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]  # original -> replacement
    because: str  # the seam that vLLM lacks
    drop_when: str  # the change in vLLM that retires the patch
    later_parameters: tuple[str, ...] = ()  # the names on a later supported vLLM, if they differ


def apply_all(patches: Sequence[Patch]) -> Callable[[], None]:
    """Find and check all targets, then replace them. Skips those already replaced.

    Returns a function that restores the originals.
    Raises Unfit if a target is not what its patch was written for, and what a patch raises;
    every target is then as it was.
    """
    found = [
        (patch, *locate(patch.target, patch.parameters, patch.later_parameters or patch.parameters))
        for patch in patches
    ]
    with ExitStack() as undo:
        for patch, owner, name, original in found:
            if hasattr(original, "__unpatched__"):
                continue
            replacement = patch.wrap(original)
            replacement.__unpatched__ = original  # type: ignore[attr-defined]
            setattr(owner, name, replacement)
            undo.callback(setattr, owner, name, original)
        return undo.pop_all().close
