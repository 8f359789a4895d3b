# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""SparseD's settings: an engine's defaults, and what one request makes of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsed_vllm.params import BadRequest, Field, flag, integer, number

BLOCK_SIZES = (16, 32, 64, 128)

_ALL = 1.0  # `select` where a mass is given and no number: else a row might not hold it

CROSSOVER = 8192
"""Tokens from which a sparse step is at least a tenth faster than a dense one on an H100.

After benchmarks/results/generate.jsonl: 1.17x with LLaDA-8B at 8k; with Dream-7B 1.05x at 4k and
1.28x at 16k. Less is not worth a recording step and what sparsity leaves out. Other devices were
not measured and use the same length.
"""


@dataclass(frozen=True)
class SparseConfig:
    """An engine's defaults, from `--additional-config '{"sparsed": {...}}'`.

    The names are the authors' (arXiv 2509.24014), but for mass and refresh.
    skip: share of the steps that run in full before the pattern is recorded
    select: share of the key blocks that later steps attend to
    block_size: tokens of a key block, and of a query block too unless these have more
    query_block_size: tokens of a query block, which have one list of key blocks; a multiple of
        block_size; None: block_size
    mass: share of the softmax mass that is enough: of the blocks that `select` keeps, a row keeps
        those that hold it; None: all of them
    refresh: the pattern is recorded again every so many steps; None: never
    min_length: tokens of prompt and canvas from which a request that does not say runs sparse
    table_ids: entries that a page has for tables, for each token, layer and head: what a request
        with small blocks must fit, and what its pages cost
    """

    skip: float = 0.2
    select: float = 0.3
    block_size: int = 128
    query_block_size: int | None = None
    mass: float | None = None
    refresh: int | None = None
    min_length: int = CROSSOVER
    table_ids: int = 8

    @classmethod
    def of(cls, additional_config: object) -> "SparseConfig":
        """The settings under the key `sparsed`. Raises BadRequest (a ValueError)."""
        given = read_section("sparsed", additional_config, SECTION_FIELDS)
        config = cls(**{"select": _ALL, **given} if "mass" in given else given)
        _check_query_blocks("sparsed.", config.block_size, config.query_block_size)
        return config


def _check_query_blocks(prefix: str, block_size: int, query_block_size: int | None) -> None:
    """Raises BadRequest where query blocks are not whole key blocks."""
    if query_block_size is not None and query_block_size % block_size:
        raise BadRequest(
            f"{prefix}query_block_size",
            query_block_size,
            f"a multiple of {prefix}block_size, which is {block_size}",
            "Raise it, lower the other, or leave it out.",
        )


def read_section(
    section: str, additional_config: object, known: Mapping[str, Field]
) -> dict[str, Any]:
    """What an operator set in one section of vLLM's additional_config. Raises BadRequest."""
    given = additional_config.get(section, {}) if isinstance(additional_config, dict) else {}
    if not isinstance(given, Mapping):
        raise BadRequest(section, given, "a mapping", f"Its keys are {', '.join(known)}.")
    for name, value in given.items():
        if name not in known:
            allowed = f"absent; the keys are {', '.join(known)}"
            raise BadRequest(f"{section}.{name}", value, allowed, "Leave it out.")
    return {name: known[name].parse(f"{section}.{name}", given[name]) for name in given}


@dataclass(frozen=True)
class Sparsity:
    """How one request runs sparse; see SparseConfig."""

    skip: float
    select: float
    block_size: int
    mass: float | None = None
    refresh: int | None = None
    query_block_size: int | None = None

    @property
    def tile(self) -> int:
        """Query rows that have one list of key blocks."""
        return self.query_block_size or self.block_size


SECTION_FIELDS = {
    "skip": Field(
        number, lambda share: 0 <= share <= 1, "a number in [0, 1]", "The authors use 0.2."
    ),
    "select": Field(
        number, lambda share: 0 < share <= 1, "a number in (0, 1]", "The authors use 0.3."
    ),
    "block_size": Field(
        integer,
        lambda size: size in BLOCK_SIZES,
        f"one of {', '.join(map(str, BLOCK_SIZES))}",
        "Use 128 for long contexts, 32 for short ones.",
    ),
    "query_block_size": Field(
        integer,
        lambda size: size in BLOCK_SIZES,
        f"one of {', '.join(map(str, BLOCK_SIZES))}, at least the block size",
        "Use 128 with smaller blocks of keys, or leave it out.",
    ),
    "mass": Field(
        number,
        lambda share: 0 < share < 1,
        "a number in (0, 1)",
        "Use 0.95, or leave it out to keep blocks by their number alone.",
    ),
    "refresh": Field(
        integer, lambda n: n >= 1, "an integer of at least 1", "Leave it out to record once."
    ),
    "min_length": Field(
        integer, lambda length: length >= 0, "an integer of at least 0", "Use 0 for no limit."
    ),
    "table_ids": Field(integer, lambda ids: ids >= 1, "an integer of at least 1", "Leave it out."),
}

REQUEST_FIELDS = {
    "use_sparsed": Field(
        flag, lambda _: True, "0 or 1", "Leave it out to let the length of the request decide."
    ),
    "sparsed_skip": SECTION_FIELDS["skip"],
    "sparsed_select": SECTION_FIELDS["select"],
    "sparsed_block_size": SECTION_FIELDS["block_size"],
    "sparsed_query_block_size": SECTION_FIELDS["query_block_size"],
    "sparsed_mass": SECTION_FIELDS["mass"],
    "sparsed_refresh": SECTION_FIELDS["refresh"],
}
"""A request's own settings, in `extra_args` or `vllm_xargs`."""


def choose_sparsity(
    config: SparseConfig | None, extra_args: Mapping[str, Any], length: int
) -> Sparsity | None:
    """How a request runs sparse, or None if it stays dense.

    config: the engine's defaults; None where its attention backend cannot run sparse
    extra_args: the request's parameters;  length: its prompt and canvas, in tokens
    Raises BadRequest.
    """
    given = {
        name: field.parse(name, extra_args[name])
        for name, field in REQUEST_FIELDS.items()
        if name in extra_args
    }
    wanted = given.pop("use_sparsed", None)
    for name in ("sparsed_mass", "sparsed_refresh"):
        if wanted is False and name in given:
            allowed = "absent when use_sparsed is 0"
            raise BadRequest(name, given[name], allowed, "Drop one of the two.")
    if config is None:
        if wanted or (given and wanted is None):
            name = "use_sparsed" if wanted else next(iter(given))
            remedy = "Serve with --attention-backend sparsed."
            raise BadRequest(name, extra_args[name], "absent on a dense backend", remedy)
        return None
    block_size = given.get("sparsed_block_size", config.block_size)
    # A request that asks for blocks of its own has square ones unless it says otherwise.
    default = None if "sparsed_block_size" in given else config.query_block_size
    query_block_size = given.get("sparsed_query_block_size", default)
    _check_query_blocks("sparsed_", block_size, query_block_size)
    if wanted is False or (wanted is None and length < config.min_length):
        return None
    return Sparsity(
        skip=given.get("sparsed_skip", config.skip),
        select=given.get("sparsed_select", _ALL if "sparsed_mass" in given else config.select),
        block_size=block_size,
        mass=given.get("sparsed_mass", config.mass),
        refresh=given.get("sparsed_refresh", config.refresh),
        query_block_size=query_block_size,
    )


def reason_for(config: SparseConfig | None, extra_args: Mapping[str, Any]) -> str:
    """What decided choose_sparsity: the attention `backend`, the `request` or its `length`."""
    if config is None:
        return "backend"
    asked = "use_sparsed" in extra_args or extra_args.get("variable_length")
    return "request" if asked else "length"
