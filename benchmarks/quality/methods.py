# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The ways to attend that are compared, by name.

Beside those listed, sparsed-SHARE, sparsed-SHARE-blocks-SIZE and, for query blocks of more tokens
than key blocks have, sparsed-SHARE-blocks-SIZE-rows-ROWS name any setting of SparseD; behind each,
-skip-SKIP the share of the steps before the table is recorded.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from sparsed_vllm.kernels.api import BLOCK_SIZES
from sparsed_vllm.reuse import Reuse

Table = Literal["none", "recorded", "renewed", "window"]


@dataclass(frozen=True)
class Method:
    """How a request attends over its steps.

    table: the key blocks of sparse steps: there are none; recorded once, as SparseD does; renewed
        at each sparse step; or those around the query block, at every step
    select, skip: SparseD's (arXiv 2509.24014); a window is as wide as SparseD's longest rows
    mass: share of the softmax mass that is enough, of what `select` keeps
    refresh: the table is recorded again every so many steps
    shared: one list for all heads, by the mean of their scores
    isolated: prompt and generation blocks are selected apart
    sinks: first blocks that a window keeps
    block_size: its own, in tokens, where it is not the bench's
    query_block_size: tokens of the query blocks, where they have more than key blocks
    reuse: how it reuses keys and values between steps, in the engine only; with it the first step
        records, whatever `skip` says
    """

    name: str
    label: str
    table: Table = "recorded"
    select: float = 0.3
    skip: float = 0.2
    mass: float | None = None
    refresh: int | None = None
    shared: bool = False
    isolated: bool = True
    sinks: int = 0
    block_size: int | None = None
    query_block_size: int | None = None
    reuse: Reuse | None = None

    @property
    def request(self) -> dict[str, Any] | None:
        """The same as a request's `extra_args`, where our engine has it."""
        if self.table == "none":
            return {"use_sparsed": 0, **self._kept}
        if self.table != "recorded" or self.shared or not self.isolated:
            return None
        sizes = {
            "sparsed_block_size": self.block_size,
            "sparsed_query_block_size": self.query_block_size,
        }
        own: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        own |= {"sparsed_select": self.select, "sparsed_skip": self.skip}
        own |= {} if self.mass is None else {"sparsed_mass": self.mass}
        own |= {} if self.refresh is None else {"sparsed_refresh": self.refresh}
        return {"use_sparsed": 1, **own, **self._kept}

    @property
    def _kept(self) -> dict[str, Any]:
        if self.reuse is None:
            return {}
        refresh = {} if self.reuse.refresh is None else {"kv_refresh": self.reuse.refresh}
        fields = {"kv_share": self.reuse.share, "kv_every": self.reuse.every}
        return {**fields, "kv_choice": self.reuse.choice, **refresh}


DENSE = Method("dense", "dense", table="none")
METHODS = {
    method.name: method
    for method in (
        DENSE,
        *(
            Method(f"sparsed-{share}", f"SparseD, select {share}", select=share)
            for share in (0.5, 0.3, 0.2, 0.1)
        ),
        *(
            Method(f"blocks-{size}", f"select 0.3, blocks of {size}", block_size=size)
            for size in (64, 128)
        ),
        *(
            Method(f"mass-{share}", f"by mass, {share}", select=1.0, mass=share)
            for share in (0.9, 0.95, 0.99)
        ),
        Method(
            "mass-0.95-128", "by mass, 0.95, blocks of 128", select=1.0, mass=0.95, block_size=128
        ),
        Method("mass-0.99-0.3", "by mass, 0.99, of select 0.3", mass=0.99),
        *(
            Method(f"refresh-{steps}", f"select 0.3, recorded every {steps} steps", refresh=steps)
            for steps in (4, 8)
        ),
        Method(
            "refresh-8-128",
            "select 0.3, recorded every 8 steps, blocks of 128",
            refresh=8,
            block_size=128,
        ),
        Method("skip-0.1", "select 0.3, skip 0.1", skip=0.1),
        Method("no-warm-up", "select 0.3, skip 0", skip=0.0),
        Method("shared", "select 0.3, one list for all heads", shared=True),
        Method("renewed", "select 0.3, a new list at each step", table="renewed"),
        Method("together", "select 0.3, not isolated", isolated=False),
        Method("window", "sliding window", table="window"),
        Method("streaming", "StreamingLLM", table="window", sinks=1),
    )
}


_SPARSED = r"sparsed-(0\.\d+|1)(?:-blocks-(\d+)(?:-rows-(\d+))?)?(?:-skip-(0(?:\.\d+)?))?"


def method_of(name: str) -> Method:
    """The method of a name. Raises ValueError, which says what names there are."""
    if name in METHODS:
        return METHODS[name]
    if match := re.fullmatch(_SPARSED, name):
        share, size, rows, _ = (part and float(part) for part in match.groups())
        are_known = all(x is None or x in BLOCK_SIZES for x in (size, rows))
        if share and are_known and (rows is None or rows % size == 0):
            return _sparsed(name, *match.groups())
    raise ValueError(
        f"--methods must be of {', '.join(METHODS)}, sparsed-SHARE, sparsed-SHARE-blocks-SIZE or "
        f"sparsed-SHARE-blocks-SIZE-rows-ROWS, -skip-SKIP behind any, shares over 0 to 1, rows a "
        f"multiple of the size, sizes {', '.join(map(str, BLOCK_SIZES))}, got {name}."
    )


def _sparsed(name: str, share: str, size: str | None, rows: str | None, skip: str | None) -> Method:
    label = f"SparseD, select {share}"
    label += f", blocks of {size}" if rows is None and size else ""
    label += f", blocks of {rows} queries by {size} keys" if rows else ""
    label += f", skip {skip}" if skip else ""
    return Method(
        name,
        label,
        select=float(share),
        skip=Method.skip if skip is None else float(skip),
        block_size=None if size is None else int(size),
        query_block_size=None if rows is None else int(rows),
    )
