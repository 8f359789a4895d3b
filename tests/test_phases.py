# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How steps are split over blocks and places over steps."""

import pytest

from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.phases import Schedule, even_share, split_steps


def schedule(num_tokens, steps, block_length, threshold=None):
    return Schedule.of(
        DenoisingParams(num_tokens, steps, block_length, "low_confidence", threshold=threshold)
    )


@pytest.mark.parametrize("num_blocks", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 8, 33])
@pytest.mark.parametrize("each", [1, 3, 64])
def test_steps_that_divide_evenly_are_split_evenly(num_blocks, size, each):
    assert split_steps(each * num_blocks, [size] * num_blocks) == [each] * num_blocks


def test_one_step_a_token_gives_each_block_a_step_a_place():
    assert split_steps(50, [16, 16, 16, 2]) == [16, 16, 16, 2]


@pytest.mark.parametrize("steps", range(4, 120, 7))
def test_all_steps_are_used_and_every_block_gets_one(steps):
    split = split_steps(steps, [16, 16, 16, 2])
    assert sum(split) == steps
    assert min(split) >= 1


def test_the_last_block_may_be_shorter():
    blocks = schedule(50, 25, 16).blocks
    assert [(block.start, block.end) for block in blocks] == [(0, 16), (16, 32), (32, 48), (48, 50)]


def test_a_step_is_found_in_its_block():
    plan = schedule(32, 16, 8)
    assert plan.num_steps == 16
    assert [plan.locate(step)[0].start for step in (0, 3, 4, 15)] == [0, 0, 8, 24]
    assert [plan.locate(step)[1] for step in (0, 3, 4, 15)] == [0, 3, 0, 3]


def test_work_goes_on_at_the_first_step_of_an_unfinished_block():
    plan = schedule(32, 16, 8)
    assert [plan.first_step_after(final) for final in (0, 8, 24, 32)] == [0, 4, 12, 16]


def test_a_threshold_may_need_a_step_for_every_place():
    assert schedule(50, 4, 16, threshold=0.9).num_steps == 50


@pytest.mark.parametrize(("places", "steps"), [(32, 32), (32, 5), (7, 20), (1, 1)])
def test_places_are_spread_evenly_the_odd_ones_first(places, steps):
    shares = [even_share(places, steps, step) for step in range(steps)]
    assert sum(shares) == places
    assert sorted(shares, reverse=True) == shares
    assert shares[0] - shares[-1] <= 1
