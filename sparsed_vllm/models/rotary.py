# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The rotary embedding's keys of config.json, in the one form that vLLM reads."""

import math
from typing import Any

ORIGINAL = "original_max_position_embeddings"

_ROPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), (ORIGINAL,)),
    "ntk": (("factor",), ("mixed_b",)),
    "dynamic": (("factor",), ("max_trained_positions",)),
    "yarn": (
        ("factor",),
        (
            ORIGINAL,
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "finetuned",  # whether the weights were trained with it
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (ORIGINAL,)),
    "longrope": (
        ("short_factor", "long_factor"),
        (ORIGINAL, "factor", "short_mscale", "long_mscale"),
    ),
}
"""vLLM's scalings of the rotary embedding of text -> what they need, and what they read besides."""

_OF_ANY_TYPE = ("rope_type", "rope_theta", "partial_rotary_factor")
_NO_NUMBERS = ("rope_type", "rope_theta", "finetuned", "truncate", "short_factor", "long_factor")
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
    if "rope_theta" in given:
        default_theta = None  # null is no base; only silence means the default
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
    rope = {key: value for key, value in _of_all_layers(rope or {}).items() if value is not None}
    kind = rope["rope_type"] = _type_of(rope)
    if kind == "default" and rope.get("factor") == 1:
        del rope["factor"]
    _check_keys(rope)
    _check_values(rope)
    if kind in _BY_ORIGINAL_LENGTH and length is not None:
        rope.setdefault(ORIGINAL, length)
    return {"rope_theta": theta, **rope}


def is_positive(value: Any) -> bool:
    """Whether it is a number over 0, and finite: JSON's readers know Infinity and NaN."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and value > 0 and math.isfinite(value)


def _of_all_layers(rope: dict[str, Any]) -> dict[str, Any]:
    """What transformers may keep by kinds of layers, of which our models have one."""
    kinds = [key for key, value in rope.items() if isinstance(value, dict)]
    if kinds == ["full_attention"] == list(rope):
        whole: dict[str, Any] = rope["full_attention"]
        return whole
    if kinds:
        raise ValueError(
            f"rope_parameters has {', '.join(kinds)}: these models have layers of one kind, "
            "full_attention. Leave it alone, or without a name."
        )
    return rope


def _type_of(rope: dict[str, Any]) -> Any:
    """Take its type, under any of its names, out of `rope`."""
    kinds = [rope.pop(key) for key in ("rope_type", "type") if key in rope]
    kinds = ["longrope" if kind == "su" else kind for kind in kinds] or ["default"]
    if kinds[0] != kinds[-1]:
        raise ValueError(f"rope_scaling has rope_type: {kinds[0]!r} and type: {kinds[1]!r}.")
    return kinds[0]


def _check_keys(rope: dict[str, Any]) -> None:
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in _ROPES:
        raise ValueError(f"rope_type must be one of {', '.join(_ROPES)}, got {kind!r}.")
    needed, read = _ROPES[kind]
    if kind == "dynamic" and "alpha" in rope:
        needed = ("alpha",)
    if missing := [key for key in needed if key not in rope]:
        raise ValueError(f"A rope_type {kind} needs {', '.join(missing)}.")
    if unused := [key for key in rope if key not in (*_OF_ANY_TYPE, *needed, *read)]:
        raise ValueError(
            f"rope_scaling has {', '.join(unused)}, which a rope_type {kind} does not use: it "
            f"reads {', '.join((*needed, *read)) or 'rope_theta'}."
        )


def _check_values(rope: dict[str, Any]) -> None:
    for key, value in rope.items():
        if key not in _NO_NUMBERS and not is_positive(value):
            raise ValueError(f"rope_scaling's {key} must be a number over 0, got {value!r}.")
    if rope["rope_type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(
            f"rope_scaling's low_freq_factor must be below high_freq_factor, got "
            f"{rope['low_freq_factor']} and {rope['high_freq_factor']}."
        )
    if not isinstance(rope.get("truncate", True), bool):
        raise ValueError(
            f"rope_scaling's truncate must be true or false, got {rope['truncate']!r}."
        )
