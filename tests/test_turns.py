# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Who takes part in a step: rules, and what they add up to over many steps."""

import math
import random
from dataclasses import replace

import pytest

from sparsed_vllm.turns import Claim, Room, Turns, make_way, take_turns

STEP = 1000  # tokens
EMPTY = Room(STEP, seats=100, pages=math.inf)


def claim(name, tokens, arrival, **rest):
    return Claim(name, tokens, arrival, **rest)


def names(claims, room=EMPTY, *, shortest_first):
    granted = take_turns(claims, room, shortest_first=shortest_first)
    assert sum(claim.rows for claim in granted) <= room.tokens
    return [claim.request for claim in granted]


@pytest.mark.parametrize("shortest_first", [False, True])
def test_whoever_fits_takes_part(shortest_first):
    claims = [claim(i, 100, i) for i in range(10)]
    assert names(claims, shortest_first=shortest_first) == list(range(10))
    assert names([], shortest_first=shortest_first) == []


def test_a_long_request_runs_in_one_kind_of_step_and_short_ones_in_the_other():
    claims = [claim("long", 1000, 0, is_running=True), claim("a", 10, 1), claim("b", 20, 2)]
    assert names(claims, shortest_first=False) == ["long"]
    assert names(claims, shortest_first=True) == ["a", "b"]


@pytest.mark.parametrize("shortest_first", [False, True])
def test_equals_wait_for_each_other(shortest_first):
    claims = [claim(i, 530 + 7 * (i % 3), i, is_running=i < 1) for i in range(5)]
    assert names(claims, shortest_first=shortest_first) == [0]


def test_the_queue_is_kept_unless_the_shortest_come_first():
    claims = [claim("one", 600, 0, is_running=True), claim("big", 500, 1), claim("small", 100, 2)]
    assert names(claims, shortest_first=False) == ["one"]
    assert names(claims, shortest_first=True) == ["small", "big"]


def test_running_requests_fill_what_an_older_one_leaves():
    claims = [claim("one", 600, 0, is_running=True), claim("two", 500, 1, is_running=True)]
    claims += [claim("three", 300, 2, is_running=True)]
    assert names(claims, shortest_first=False) == ["one", "three"]


@pytest.mark.parametrize("shortest_first", [False, True])
def test_a_lower_priority_number_comes_first(shortest_first):
    claims = [
        claim("idle", 10, 0, priority=5, is_running=True),
        claim("urgent", 1000, 9, priority=-1),
        claim("usual", 10, 1, priority=0, is_running=True),
    ]
    assert names(claims, shortest_first=shortest_first) == ["urgent"]


@pytest.mark.parametrize("room", [replace(EMPTY, seats=0), replace(EMPTY, pages=3)], ids=str)
@pytest.mark.parametrize("shortest_first", [False, True])
def test_nobody_takes_the_seat_or_the_pages_that_an_older_request_lacks(room, shortest_first):
    claims = [claim("runs", 900, 0, is_running=True), claim("big", 64, 1, pages=4)]
    claims += [claim("small", 16, 2, pages=1)]
    assert names(claims, room, shortest_first=shortest_first) == ["runs"]


def test_a_step_of_few_rows_leaves_room_for_others():
    claims = [claim("light", 900, 0, rows=100, is_running=True), claim("whole", 900, 1)]
    assert names(claims, shortest_first=False) == ["light", "whole"]


def run(requests):
    """{name: (step of its start, step of its end)}; requests: name -> (tokens, steps, arrival)."""
    left = {name: steps for name, (_, steps, _) in requests.items()}
    started, ended = {}, {}
    shortest_first, step = True, 0
    while len(ended) < len(requests):
        claims = [
            claim(name, tokens, arrival, is_running=name in started)
            for name, (tokens, _, arrival) in requests.items()
            if arrival <= step and name not in ended
        ]
        granted = names(claims, shortest_first=shortest_first)
        if len(granted) < len(claims):
            shortest_first = not shortest_first
        for name in granted:
            started.setdefault(name, step)
            left[name] -= 1
            if not left[name]:
                ended[name] = step
        step += 1
    return {name: (started[name], ended[name]) for name in requests}


@pytest.mark.parametrize("seed", range(20))
def test_a_short_request_waits_a_step_at_most_beside_long_ones(seed):
    draw = random.Random(seed)
    requests = {f"long{i}": (draw.randrange(512, 1001), 200, i) for i in range(3)}
    requests |= {f"short{i}": (draw.randrange(5, 16), 20, draw.randrange(300)) for i in range(60)}
    for name, (start, end) in run(requests).items():
        if name.startswith("short"):
            arrival = requests[name][2]
            assert start - arrival <= 1
            assert end - arrival <= 2 * 20


@pytest.mark.parametrize("seed", range(20))
def test_nobody_starves(seed):
    """The oldest has every other step at least: all are done after twice their steps in a row."""
    draw = random.Random(seed)
    requests = {
        i: (draw.randrange(1, 1001), draw.randrange(1, 30), draw.randrange(200)) for i in range(60)
    }
    ends = run(requests)
    by_age = sorted(requests, key=lambda name: requests[name][2])
    for i, name in enumerate(by_age):
        in_a_row = sum(requests[older][1] for older in by_age[: i + 1])
        assert ends[name][1] <= 200 + 2 * in_a_row


def test_a_stream_of_short_requests_leaves_a_long_one_every_other_step():
    requests = {f"short{i}": (400, 3, i) for i in range(1, 300)}
    start, end = run({"long": (1000, 50, 0), **requests})["long"]
    assert start == 0
    assert end <= 2 * 50


def light(name, rows, arrival, tokens=600, **rest):
    """A request that reuses keys and values and runs."""
    return claim(name, tokens, arrival, rows=rows, is_running=True, makes_way=True, **rest)


def test_running_light_requests_make_way_for_a_newcomer_s_first_step():
    claims = [light("a", 30, 0), light("b", 40, 1), claim("new", 950, 2), claim("newer", 900, 3)]
    assert [c.request for c in make_way(claims, EMPTY)] == ["new", "a"]


def test_they_make_way_for_nobody_who_cannot_come_in():
    claims = [light("a", 30, 0), claim("exact", 500, 1, is_running=True)]
    assert make_way(claims, EMPTY) == []
    assert make_way([*claims, claim("new", 501, 2)], EMPTY) == []
    assert make_way([*claims, claim("new", 400, 2, pages=4)], replace(EMPTY, pages=3)) == []
    assert make_way([*claims, claim("new", 400, 2)], replace(EMPTY, seats=0)) == []


def test_they_make_way_for_nobody_of_less_importance():
    claims = [light("a", 100, 5), claim("new", 950, 0, priority=1)]
    assert make_way(claims, EMPTY) == []


def test_exact_requests_make_way_for_nobody():
    claims = [claim("exact", 100, 0, is_running=True), claim("new", 950, 1)]
    assert make_way(claims, EMPTY) == []


def test_a_turn_that_would_let_nobody_in_is_left_out():
    turns, seen = Turns(), []
    claims = [claim("long", 1000, 0, is_running=True), claim("short", 10, 1, is_running=True)]
    for _ in range(4):
        seen.append([c.request for c in turns.take(claims, EMPTY)])
    assert seen == [["short"], ["long"]] * 2


def run_reusing(requests):
    """{name: (step of its start, step of its end)}

    requests: name -> (tokens, rows of light steps or None, steps, refresh or None, arrival)
    """
    taken, started, ended = dict.fromkeys(requests, 0), {}, {}
    turns, step = Turns(), 0
    while len(ended) < len(requests):
        claims = []
        for name, (tokens, rows, _, refresh, arrival) in requests.items():
            if arrival > step or name in ended:
                continue
            is_whole = not taken[name] or rows is None or (refresh and taken[name] % refresh == 0)
            claims.append(
                claim(
                    name,
                    tokens,
                    arrival,
                    rows=tokens if is_whole else rows,
                    is_running=name in started,
                    makes_way=rows is not None,
                )
            )
        granted = turns.take(claims, EMPTY)
        assert sum(c.rows for c in granted) <= STEP
        for name in (c.request for c in granted):
            started.setdefault(name, step)
            taken[name] += 1
            if taken[name] == requests[name][2]:
                ended[name] = step
        step += 1
        assert step < 100_000
    return {name: (started[name], ended[name]) for name in requests}


@pytest.mark.parametrize("seed", range(20))
def test_a_newcomer_starts_after_three_steps_for_each_before_it(seed):
    """However many light requests run, and however much of a step its first one needs."""
    draw = random.Random(seed)
    requests = {}
    for i in range(40):
        tokens, refresh = draw.randrange(300, 1001), draw.choice((None, None, 5))
        rows, steps = draw.randrange(5, 60), draw.randrange(30, 200)
        requests[i] = (tokens, rows, steps, refresh, draw.randrange(400))
    begun = run_reusing(requests)
    for name, (start, _) in begun.items():
        arrival = requests[name][-1]
        waiting = [n for n in requests if requests[n][-1] <= arrival and begun[n][0] >= arrival]
        assert start - arrival <= 3 * len(waiting)


@pytest.mark.parametrize("seed", range(20))
def test_nobody_starves_beside_newcomers_and_light_steps(seed):
    """The oldest has every third step at least: all end after three times their steps in a row."""
    draw = random.Random(seed)
    requests = {}
    for i in range(60):
        tokens, steps = draw.randrange(1, 1001), draw.randrange(1, 30)
        rows = draw.choice((None, max(1, tokens // 10)))
        requests[i] = (tokens, rows, steps, draw.choice((None, 2, 3)), draw.randrange(200))
    ends = run_reusing(requests)
    by_age = sorted(requests, key=lambda name: requests[name][-1])
    for i, name in enumerate(by_age):
        in_a_row = sum(requests[older][2] for older in by_age[: i + 1])
        assert ends[name][1] <= 200 + 3 * in_a_row


def test_a_stream_of_newcomers_leaves_a_light_request_every_third_step():
    requests = {i: (990, 5, 2, None, i) for i in range(1, 300)}
    start, end = run_reusing({"light": (900, 20, 50, None, 0), **requests})["light"]
    assert start == 0
    assert end <= 3 * 50
