# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The ways to reuse keys and values that are compared, by name.

    reuse-0.02-every-2-refresh-8-sparse    selective refresh with these settings, by the engine
    reuse-0.02-mass-0.95-record-8          with tables by mass, which are recorded every 8 steps
    cached-8, dual-16                      Fast-dLLM's prefix and dual cache, blocks of so many
    plain                                  every step computes all, by the caches' network
    dense, sparsed-0.3, mass-0.95, ...     exact requests: methods.py's that the engine has

What varies settings that requests do not have (experiments.py) follows in the same way.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from quality.experiments import EXPERIMENTS, check
from quality.methods import METHODS, Method
from sparsed_vllm.reuse import CHOICES, Reuse

Cache = Literal["none", "prefix", "dual"]


@dataclass(frozen=True)
class ReuseMethod(Method):
    """A method of the comparison.

    block_length: places that are denoised together; None: all
    cache: what the plain network computes between whole steps (caches.py); None: the engine answers
    experiment: settings of the engine that it runs under, by name
    """

    block_length: int | None = None
    cache: Cache | None = None
    experiment: tuple[tuple[str, str], ...] = ()

    @property
    def request(self) -> dict[str, Any] | None:
        """As of Method; None where the plain network answers."""
        if self.cache is not None:
            return None
        blocks = {} if self.block_length is None else {"block_length": self.block_length}
        return {**(super().request or {}), **blocks}


def method_of(name: str) -> ReuseMethod:
    """The method of a name. Raises ValueError, which says what names there are."""
    kind, *words = name.split("-")
    if kind == "reuse" and words:
        return _reusing(name, words)
    if kind in CACHES and len(words) == 1 and words[0].isdecimal() and int(words[0]) > 0:
        return ReuseMethod(name, name, "none", block_length=int(words[0]), cache=CACHES[kind])
    if name == "plain":
        return ReuseMethod(name, name, "none", cache="none")
    if name in METHODS and METHODS[name].request is not None:
        return ReuseMethod(**vars(METHODS[name]))
    raise ValueError(f"{name} is no method; {NAMES}")


CACHES: dict[str, Cache] = {"cached": "prefix", "dual": "dual"}
FIELDS = ("every", "refresh", "blocks", "by", "mass", "record")
NAMES = (
    "those are plain, cached-BLOCK, dual-BLOCK, reuse-SHARE, and of exact requests "
    + ", ".join(name for name, method in METHODS.items() if method.request is not None)
    + f". reuse-SHARE takes -every-N, -refresh-N, -blocks-N, -by-{', -by-'.join(CHOICES)}, "
    "-sparse, -mass-SHARE, -record-N and, of experiments, "
    + ", ".join(f"-{name}-X" for name in EXPERIMENTS)
)


def _reusing(name: str, words: list[str]) -> ReuseMethod:
    share, *rest = words
    method = ReuseMethod(name, name, "none", reuse=Reuse(float(share)))
    while rest:
        word = rest.pop(0)
        if word == "sparse":
            method = replace(method, table="recorded")
        elif word in (*FIELDS, *EXPERIMENTS) and rest:
            method = _with(method, word, rest.pop(0))
        else:
            raise ValueError(f"{name}: {word} is no setting; {NAMES}")
    return method


def _with(method: ReuseMethod, field: str, value: str) -> ReuseMethod:
    assert method.reuse is not None
    if field in EXPERIMENTS:
        check(field, value)
        return replace(method, experiment=(*method.experiment, (field, value)))
    if field == "blocks":
        return replace(method, block_length=int(value))
    if field == "mass":
        return replace(method, table="recorded", select=1.0, mass=float(value))
    if field == "record":
        return replace(method, table="recorded", refresh=int(value))
    if field == "by":
        if value not in CHOICES:
            raise ValueError(f"{value} is no choice; {NAMES}")
        return replace(method, reuse=replace(method.reuse, choice=value))
    return replace(method, reuse=replace(method.reuse, **{field: int(value)}))


SHARES, EVERY = ("0.01", "0.02", "0.05"), ("", "-every-2", "-every-4")
REUSE_METHODS = (
    "dense",
    "sparsed-0.3",
    "reuse-0",
    "reuse-0-refresh-8",
    *(f"reuse-{share}{every}" for share in SHARES for every in EVERY),
    *(f"reuse-{share}-by-{choice}" for share in ("0.01", "0.02") for choice in ("match", "both")),
    "reuse-0-sparse",
    "reuse-0-refresh-8-sparse",
    *(f"reuse-{share}{every}-sparse" for share in SHARES for every in EVERY),
    "plain",
    "dual-8",
    "dual-16",
    "dual-32",
)
"""What benchmarks/bench_quality_reuse.py compares, if it is not told."""
