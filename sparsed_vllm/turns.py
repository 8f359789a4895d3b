# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Who takes part in a step when not everybody fits: every other step goes to the shortest."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Claim:
    """A request that could take part in the coming step.

    request: whose claim it is
    tokens: its prompt and canvas, which a step computes whole
    arrival: when it came; the lower, the older
    priority: those with a lower one come first (0 where priorities do not count)
    is_running: whether it has its seat and pages already
    pages, table_tokens: pages and tokens of sparse tables that it takes for itself
    """

    request: Any
    tokens: int
    arrival: float
    priority: int = 0
    is_running: bool = False
    pages: int = 0
    table_tokens: int = 0


@dataclass(frozen=True)
class Room:
    """What is free: tokens in the step and, for requests that do not run yet, all the rest."""

    tokens: int
    seats: int
    pages: float
    table_tokens: int

    def less(self, claim: Claim) -> "Room | None":
        """The room beside `claim`; None if it does not fit."""
        room = replace(self, tokens=self.tokens - claim.tokens)
        if not claim.is_running:
            room = replace(
                room,
                seats=self.seats - 1,
                pages=self.pages - claim.pages,
                table_tokens=self.table_tokens - claim.table_tokens,
            )
        fits = min(room.tokens, room.seats, room.pages, room.table_tokens) >= 0
        return room if fits or (claim.is_running and room.tokens >= 0) else None


def take_turns(claims: Iterable[Claim], room: Room, *, shortest_first: bool) -> list[Claim]:
    """The claims that are granted in a step, in their order.

    Oldest first: whoever is oldest takes part, so that everybody's time comes; and a request
    that does not run yet is not overtaken by others that do not.
    shortest_first: by length instead, in classes that double, and by age within a class: long
        requests do not hold up short ones, and equals do not crowd each other out. What an older
        request lacks in order to run at all is not given to a younger one even so.
    """
    claims = sorted(claims, key=_by_age)
    may_start = _unhindered([claim for claim in claims if not claim.is_running], room)
    if shortest_first:
        claims.sort(key=_by_length)
    chosen: list[Claim] = []
    queue_is_held = False
    for claim in claims:
        if not claim.is_running and (queue_is_held or claim not in may_start):
            continue
        left = room.less(claim)
        if left is not None:
            room = left
            chosen.append(claim)
        elif not claim.is_running:
            queue_is_held = not shortest_first
    return chosen


def _unhindered(newcomers: list[Claim], room: Room) -> set[Claim]:
    """Those of `newcomers`, oldest first, that take nothing an older one lacks."""
    found = set()
    tables_are_short = False
    for claim in newcomers:
        if room.seats < 1 or room.pages < claim.pages:
            break
        if claim.table_tokens > (0 if tables_are_short else room.table_tokens):
            tables_are_short = True
            continue
        found.add(claim)
    return found


def _by_age(claim: Claim) -> tuple[int, float]:
    return claim.priority, claim.arrival


def _by_length(claim: Claim) -> tuple[int, int, float]:
    return claim.priority, claim.tokens.bit_length(), claim.arrival
