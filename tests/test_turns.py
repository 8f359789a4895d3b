# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Who takes part in a step: rules, and what they add up to over many steps."""

import math
import random
from dataclasses import replace

import pytest

from sparsed_vllm.turns import Claim, Room, take_turns

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
