# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Which requests a step serves when not all fit: steps go to the shortest and the oldest in turn,
and some to a newcomer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from operator import attrgetter
from typing import Any


@dataclass(slots=True)
class Claim:
    """A request that could take part in the coming step. Made once, as sorting reads its keys.

    request: whose claim it is
    tokens: its prompt and canvas
    arrival: when it came; the lower, the older
    priority: those with a lower one come first (0 where priorities do not count)
    rows: tokens that its coming step computes; 0: all
    is_running: whether it has its seat and pages already;  pages: that it takes
    makes_way: whether it pauses, once it runs, for a newcomer's first step: its steps are many and
        of few rows
    """

    request: Any
    tokens: int
    arrival: float
    priority: int = 0
    rows: int = 0
    is_running: bool = False
    pages: int = 0
    makes_way: bool = False
    by_age: tuple[int, float] = field(init=False)
    by_length: tuple[int, int, float] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.rows or self.tokens
        self.by_age = (self.priority, self.arrival)
        self.by_length = (self.priority, self.tokens.bit_length(), self.arrival)


@dataclass(slots=True)
class Room:
    """What is free: rows in the step and, for requests that do not run yet, all the rest."""

    tokens: int
    seats: int
    pages: float

    def take(self, claim: Claim) -> bool:
        """Take what `claim` needs, if it is there."""
        if claim.rows > self.tokens:
            return False
        if not claim.is_running:
            if self.seats < 1 or claim.pages > self.pages:
                return False
            self.seats -= 1
            self.pages -= claim.pages
        self.tokens -= claim.rows
        return True


class Turn(Enum):
    """Who comes first in a step that does not hold all."""

    SHORTEST = "shortest"
    OLDEST = "oldest"
    NEWCOMER = "newcomer"


_AFTER = {
    Turn.SHORTEST: Turn.OLDEST,
    Turn.OLDEST: Turn.NEWCOMER,
    Turn.NEWCOMER: Turn.SHORTEST,
}


class Turns:
    """Whose turn the coming step is."""

    def __init__(self) -> None:
        self.turn = Turn.SHORTEST

    def take(self, claims: Iterable[Claim], room: Room) -> list[Claim]:
        """The claims that are granted in a step, in their order; where some are not, the next step
        is another's turn.

        The newcomer's is left out where it would let nobody in.
        """
        claims = list(claims)
        granted = make_way(claims, room) if self.turn is Turn.NEWCOMER else []
        if not granted:
            self.turn = Turn.SHORTEST if self.turn is Turn.NEWCOMER else self.turn
            granted = take_turns(claims, room, shortest_first=self.turn is Turn.SHORTEST)
        if len(granted) < len(claims):
            self.turn = _AFTER[self.turn]
        return granted


def make_way(claims: Iterable[Claim], room: Room) -> list[Claim]:
    """The claims that are granted where running ones of many light steps come last.

    They may leave a newcomer no room for its first step, which computes all of its tokens, for as
    long as any of them runs. None are granted where none of them runs, or nobody would come in.
    """
    claims = list(claims)
    if not any(claim.is_running and claim.makes_way for claim in claims):
        return []
    order = sorted(claims, key=lambda c: (c.priority, c.is_running and c.makes_way, c.arrival))
    granted = _grant(order, replace(room), keeps_queue=True)
    return granted if any(not claim.is_running for claim in granted) else []


def take_turns(claims: Iterable[Claim], room: Room, *, shortest_first: bool) -> list[Claim]:
    """The claims that are granted in a step, in their order.

    Oldest first: the oldest always takes part, so no request starves; and a request that does not
    run yet is not overtaken by others that do not.
    shortest_first: by length instead, in classes that double, and by age within a class: long
        requests do not hold up short ones, and equals do not crowd each other out. What an older
        request lacks in order to run at all is not given to a younger one even so.
    """
    room = replace(room)
    order = sorted(claims, key=attrgetter("by_age"))
    if shortest_first:
        order = _unhindered(order, room)
        order.sort(key=attrgetter("by_length"))
    return _grant(order, room, keeps_queue=not shortest_first)


def _grant(order: Iterable[Claim], room: Room, *, keeps_queue: bool) -> list[Claim]:
    """The claims that find room one after another, which they take.

    keeps_queue: whether one that does not run yet is not overtaken by others that do not
    """
    granted: list[Claim] = []
    queue_is_held = False
    for claim in order:
        if room.tokens < 1:
            break
        if queue_is_held and not claim.is_running:
            continue
        if room.take(claim):
            granted.append(claim)
        elif keeps_queue and not claim.is_running:
            queue_is_held = True
    return granted


def _unhindered(claims: list[Claim], room: Room) -> list[Claim]:
    """Running requests and, oldest first, newcomers up to one that lacks a seat or pages."""
    if room.seats < 1:
        return [claim for claim in claims if claim.is_running]
    for place, claim in enumerate(claims):
        if claim.pages > room.pages and not claim.is_running:
            return claims[:place] + [claim for claim in claims[place:] if claim.is_running]
    return claims
