# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The record of what is masked."""

import torch

from sparsed_vllm.canvas import Canvas

MASK = 99


def canvas(num_tokens=10, block_length=4):
    return Canvas(
        torch.full((num_tokens,), MASK), torch.ones(num_tokens, dtype=torch.bool), block_length
    )


def fill(target, places):
    count = len(places)
    tokens = torch.tensor(places) * 10
    target.fill(torch.tensor(places), tokens, torch.ones(count, dtype=torch.bool))


def test_only_the_first_unfinished_block_is_open():
    target = canvas()
    assert target.open_places(4).tolist() == [0, 1, 2, 3]
    fill(target, [0, 1, 3])
    assert target.open_places(1).tolist() == [2]
    fill(target, [2])
    assert target.open_places(4).tolist() == [4, 5, 6, 7]


def test_no_place_behind_the_end_is_open():
    target = canvas()
    assert target.open_places(4, end=4).tolist() == [0, 1, 2, 3]
    fill(target, [0, 1, 2, 3])
    assert target.open_places(4, end=4).tolist() == [-1, -1, -1, -1]


def test_a_bound_on_the_open_places_is_padded():
    target = canvas()
    fill(target, [1])
    assert target.open_places(6).tolist() == [0, 2, 3, -1, -1, -1]


def test_padding_fills_nothing():
    target = canvas()
    places = torch.tensor([0, 2, -1])
    target.fill(places, torch.tensor([5, 6, 7]), torch.tensor([True, False, False]))
    assert target.tokens.tolist() == [5, *[MASK] * 9]
    assert target.masked.sum() == 9


def test_a_block_is_final_when_no_place_of_it_is_masked():
    target = canvas()
    fill(target, [0, 1, 2])
    assert target.num_final() == 0
    fill(target, [3, 4])
    assert target.num_final() == 4
    fill(target, [5, 6, 7, 8, 9])
    assert target.num_final() == 10


def test_what_is_masked_is_not_read_off_the_token():
    target = canvas()
    everywhere = torch.ones(4, dtype=torch.bool)
    target.fill(torch.tensor([0, 1, 2, 3]), torch.full((4,), MASK), everywhere)
    assert target.num_final() == 4


def test_a_finished_canvas_has_nothing_open():
    target = canvas(3, 2)
    fill(target, [0, 1, 2])
    assert target.open_places(2).tolist() == [-1, -1]
    assert target.num_final() == 3
