# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Installs patches: all of them, or none if vLLM has changed under one."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One replaced function of vLLM."""

    target: str  # "package.module:Owner.attribute"
    parameters: tuple[str, ...]  # the names it is called with
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]  # original -> replacement
    because: str  # the seam that vLLM lacks
    drop_when: str  # the change in vLLM that retires the patch
    later_parameters: tuple[str, ...] = ()  # the names on a later supported vLLM, if they differ


class PatchMismatch(RuntimeError):
    """A patch's target is gone, or takes other parameters than the patch was written for."""


def apply_all(patches: Sequence[Patch]) -> None:
    """Find and check all targets, then replace them. Does nothing for those already replaced.

    Raises PatchMismatch, with nothing replaced.
    """
    found = [(patch, *_locate(patch)) for patch in patches]
    for patch, owner, name, original in found:
        if hasattr(original, "__unpatched__"):
            continue
        replacement = patch.wrap(original)
        replacement.__unpatched__ = original  # type: ignore[attr-defined]
        setattr(owner, name, replacement)


def _locate(patch: Patch) -> tuple[Any, str, Callable[..., Any]]:
    """The owner of the target, its name there, and the target."""
    module, _, path = patch.target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part, None)
    original = getattr(owner, name, None)
    if original is None:
        raise PatchMismatch(f"{patch.target} does not exist in this vLLM")
    parameters = tuple(inspect.signature(original).parameters)
    if parameters not in (patch.parameters, patch.later_parameters):
        raise PatchMismatch(f"{patch.target} takes {parameters}, not {patch.parameters}")
    return owner, name, original
