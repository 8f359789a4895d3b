# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Selective refresh: how requests reuse keys and values between steps, and what they renew."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsed_vllm.config import read_section
from sparsed_vllm.params import BadRequest, Field, check_periods, flag, integer, number, word

PRESET = "selective"
"""The word that switches an engine's reuse on, with the defaults of ReuseConfig."""

EVERY = 2
"""Prompt tokens are computed in every second step, if nothing else is said."""

CHOICES = ("attention", "match", "both")
"""By what tokens are chosen: how much masked places attend to them; what was filled that matches
them (match.py); or the sum of the two, each by its own sum."""


@dataclass(frozen=True)
class Reuse:
    """How one request reuses keys and values between steps.

    share: of the tokens before the current block, those that a light step computes anew
    every: such tokens are computed in every `every`-th step only
    refresh: every so many steps all tokens are computed; None: in the first step only
    choice: by what such tokens are chosen (one of CHOICES)
    """

    share: float
    every: int = 1
    refresh: int | None = None
    choice: str = CHOICES[0]

    @property
    def by_attention(self) -> bool:
        return self.choice != "match"

    @property
    def by_match(self) -> bool:
        return self.choice != "attention"


@dataclass(frozen=True)
class ReuseConfig:
    """An engine's defaults, from `--additional-config '{"reuse": "selective"}'` or a mapping.

    Without the section no request may reuse keys and values, and pages have no room for them.
    share, every, refresh, choice: as in Reuse; every: None: EVERY, or 1 where a threshold decides
        how many places a step fills: then steps are few
    by_default: whether requests that do not say reuse them
    layers: share of the layers, from the last, whose attention chooses
    """

    share: float = 0.02
    every: int | None = None
    refresh: int | None = None
    choice: str = CHOICES[0]
    by_default: bool = True
    layers: float = 0.25

    @classmethod
    def of(cls, additional_config: object) -> "ReuseConfig | None":
        """The settings under the key `reuse`; None without it. Raises BadRequest."""
        if not isinstance(additional_config, dict) or "reuse" not in additional_config:
            return None
        given = additional_config["reuse"]
        if given == PRESET:
            return cls()
        if not isinstance(given, Mapping):
            allowed = f'"{PRESET}" or a mapping'
            raise BadRequest("reuse", given, allowed, f"Its keys are {', '.join(SECTION_FIELDS)}.")
        return cls(**read_section("reuse", additional_config, SECTION_FIELDS))


_SHARE = Field(
    number, lambda share: 0 <= share <= 1, "a number in [0, 1]", "Use 0.02, or 1 for exact steps."
)
_COUNT = Field(integer, lambda n: n >= 1, "an integer of at least 1", "Leave it out.")
_CHOICE = Field(
    word, lambda name: name in CHOICES, f"one of {', '.join(CHOICES)}", f"Use {CHOICES[0]}."
)
SECTION_FIELDS = {
    "share": _SHARE,
    "every": _COUNT,
    "refresh": _COUNT,
    "choice": _CHOICE,
    "layers": Field(number, lambda share: 0 < share <= 1, "a number in (0, 1]", "Leave it out."),
    "by_default": Field(flag, lambda _: True, "0 or 1", "Leave it out to reuse by default."),
}

REQUEST_FIELDS = {
    "kv_reuse": Field(flag, lambda _: True, "0 or 1", "Leave it out for the engine's default."),
    "kv_share": _SHARE,
    "kv_every": _COUNT,
    "kv_refresh": _COUNT,
    "kv_choice": _CHOICE,
}
"""A request's own settings, in `extra_args` or `vllm_xargs`."""


def choose_reuse(
    config: ReuseConfig | None,
    extra_args: Mapping[str, Any],
    num_steps: int,
    by_threshold: bool = False,
) -> Reuse | None:
    """How a request reuses keys and values, or None if every step computes all tokens.

    config: the engine's defaults; None where its pages hold no keys and values
    extra_args: the request's parameters;  num_steps: the most that it takes
    by_threshold: whether a threshold decides how many
    Raises BadRequest.
    """
    given = {
        name: field.parse(name, extra_args[name])
        for name, field in REQUEST_FIELDS.items()
        if name in extra_args
    }
    wanted = given.pop("kv_reuse", None)
    if config is None:
        if wanted or (given and wanted is None):
            name = "kv_reuse" if wanted else next(iter(given))
            remedy = f'Start it with --additional-config \'{{"reuse": "{PRESET}"}}\'.'
            allowed = "absent on an engine started without reuse"
            raise BadRequest(name, extra_args[name], allowed, remedy)
        return None
    check_periods(given, ("kv_every", "kv_refresh"), num_steps)
    if wanted is None:
        wanted = bool(given) or config.by_default
    share = given.get("kv_share", config.share)
    refresh = given.get("kv_refresh", config.refresh)
    # What computes all tokens at every step is an exact step.
    if not wanted or share == 1 or refresh == 1:
        return None
    every = given.get("kv_every", config.every) or (1 if by_threshold else EVERY)
    return Reuse(share, every, refresh, given.get("kv_choice", config.choice))
