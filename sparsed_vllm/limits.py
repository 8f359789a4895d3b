# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What the operator of an engine lets its clients ask for, and how its server refuses the rest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsed_vllm import config, reuse
from sparsed_vllm.config import read_section
from sparsed_vllm.families import FAMILIES
from sparsed_vllm.models.registry import MODELS
from sparsed_vllm.params import BadRequest, DenoisingParams, Field, flag, integer, request_fields

DEFAULT_MAX_TOKENS = 128
"""The canvas of a request that names no length, if neither operator nor checkpoint does."""

_KNOWN_FIELDS = frozenset(config.REQUEST_FIELDS | reuse.REQUEST_FIELDS).union(
    *(request_fields(family, 1) for family in FAMILIES)
)


@dataclass(frozen=True)
class Limits:
    """An engine's limits, from `--additional-config '{"denoising": {...}}'`.

    default_max_tokens: the canvas of a request that names no length; None: the checkpoint's
        max_new_tokens, or else DEFAULT_MAX_TOKENS
    max_tokens: the longest canvas; None: as long as the context
    max_steps: the most steps that a request may take; None: no limit but that of `steps`
    request_fields: our parameters (`extra_args`, `vllm_xargs`) that clients may set; None: all
    early_errors: refuse with an HTTP status what vLLM's server reports inside of a stream that has
        begun, or not at all; see docs/patches.md
    """

    default_max_tokens: int | None = None
    max_tokens: int | None = None
    max_steps: int | None = None
    request_fields: tuple[str, ...] | None = None
    early_errors: bool = False

    @classmethod
    def of(cls, additional_config: object) -> "Limits":
        """The settings under the key `denoising`. Raises BadRequest (a ValueError)."""
        return cls(**read_section("denoising", additional_config, SECTION_FIELDS))

    def default_length(self, checkpoint_s: int | None) -> int:
        """What to give a request that names no length.

        checkpoint_s: its max_new_tokens; None if it has none
        """
        default = self.default_max_tokens or checkpoint_s or DEFAULT_MAX_TOKENS
        return min(default, self.max_tokens or default)

    def check_length(self, max_tokens: int) -> None:
        """Refuse a canvas that is too long. Raises BadRequest."""
        if self.max_tokens is not None and max_tokens > self.max_tokens:
            raise BadRequest(
                "max_tokens",
                max_tokens,
                f"at most {self.max_tokens} on this server",
                "Lower it; its operator may raise denoising.max_tokens.",
            )

    def check_fields(self, extra_args: Mapping[str, Any]) -> None:
        """Refuse parameters that clients may not set. Raises BadRequest."""
        if self.request_fields is None:
            return
        for name in extra_args:
            if name in _KNOWN_FIELDS and name not in self.request_fields:
                mine = ", ".join(self.request_fields) or "none of these parameters"
                allowed = f"absent: this server lets clients set {mine}"
                raise BadRequest(name, extra_args[name], allowed, "Leave it out.")

    def check_threshold(self, params: DenoisingParams) -> None:
        """A threshold may take a step for each token, whatever `steps` says. Raises BadRequest."""
        if params.threshold is None or self.max_steps is None:
            return
        if params.num_tokens > self.max_steps:
            raise BadRequest(
                "max_tokens",
                params.num_tokens,
                f"at most {self.max_steps} with a threshold: each token may take a step, and "
                "this server allows no more of them",
                "Lower max_tokens or leave the threshold out.",
            )


def _known_fields(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError
    return tuple(value)


_COUNT = Field(integer, lambda count: count >= 1, "an integer of at least 1", "Leave it out.")
SECTION_FIELDS = {
    "default_max_tokens": _COUNT,
    "max_tokens": _COUNT,
    "max_steps": _COUNT,
    "request_fields": Field(
        _known_fields,
        lambda names: _KNOWN_FIELDS.issuperset(names),
        f"a list of some of {', '.join(sorted(_KNOWN_FIELDS))}",
        "Leave it out to allow all of them.",
    ),
    "early_errors": Field(flag, lambda _: True, "0 or 1", "Leave it out for vLLM's own answers."),
}


def wants_early_errors(vllm_config: Any) -> bool:
    """Whether an engine serves one of our models, and its operator set early_errors."""
    if vllm_config.model_config.architecture not in MODELS:
        return False
    return Limits.of(vllm_config.additional_config).early_errors
