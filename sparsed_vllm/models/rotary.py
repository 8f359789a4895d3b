# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The rotary embedding's keys of config.json, in the one form that vLLM reads."""

from typing import Any

_ROPES: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "ntk": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "longrope": frozenset({"short_factor", "long_factor"}),
}
"""vLLM's scalings of the rotary embedding of text -> what they need."""

ORIGINAL = "original_max_position_embeddings"
_BY_ORIGINAL_LENGTH = ("yarn", "llama3", "longrope")
"""Scalings that start from the length that the model was trained for."""


def one_rotary(given: dict[str, Any], default_theta: float | None) -> dict[str, Any]:
    """Take the keys of the rotary embedding out of `given`; one dictionary for all of them."""
    scaling, parameters = given.pop("rope_scaling", None), given.pop("rope_parameters", None)
    if scaling and parameters and scaling != parameters:
        raise ValueError("config.json has rope_scaling and rope_parameters. Remove one.")
    rope = standard_rotary(scaling or parameters, None)
    if rope["rope_theta"] is None:
        del rope["rope_theta"]
    theta = given.pop("rope_theta", None)
    if theta is not None and rope.setdefault("rope_theta", theta) != theta:
        raise ValueError(
            f"config.json says rope_theta: {theta!r} and, beside the scaling, "
            f"{rope['rope_theta']!r}. Remove one."
        )
    return standard_rotary(rope, default_theta)


def standard_rotary(
    rope: dict[str, Any] | None, theta: float | None, length: int | None = None
) -> dict[str, Any]:
    """`rope` with its type under today's name, and `theta` where it has no base of its own.

    length: the model's, where a scaling does not say which one it was trained for
    Raises ValueError for a type that is not vLLM's, or that lacks what it needs.
    """
    if not isinstance(rope or {}, dict):
        raise ValueError(f"rope_scaling must be a mapping or null, got {rope!r}.")
    rope = dict(rope or {})
    if "rope_type" not in rope:
        rope["rope_type"] = rope.pop("type", "default")
    if rope["rope_type"] == "su":
        rope["rope_type"] = "longrope"
    needed = _ROPES.get(rope["rope_type"])
    if needed is None:
        kinds = ", ".join(_ROPES)
        raise ValueError(f"rope_type must be one of {kinds}, got {rope['rope_type']!r}.")
    if missing := sorted(needed - rope.keys()):
        raise ValueError(f"A rope_type {rope['rope_type']} needs {', '.join(missing)}.")
    for key in ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL):
        if not is_positive(rope.get(key, 1)):
            raise ValueError(f"rope_scaling's {key} must be a number over 0, got {rope[key]!r}.")
    if rope["rope_type"] in _BY_ORIGINAL_LENGTH and length is not None:
        rope.setdefault(ORIGINAL, length)
    return {"rope_theta": theta, **rope}


def is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
