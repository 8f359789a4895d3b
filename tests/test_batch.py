# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The rows of a step: those that are read, and those that the last layer computes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsed_vllm.batch import RowWindows, window_bounds
from sparsed_vllm.config import BLOCK_SIZES
from sparsed_vllm.steps import Block, Phase, Source


def batch_of(*requests):
    """Starts, steps and plans of a batch.

    requests: (prompt_len, num_tokens, first open place, end of the open ones, phase)
    """
    plans = [SimpleNamespace(prompt_len=one[0]) for one in requests]
    steps = [
        SimpleNamespace(block=Block(first, end, 1), end=end, phase=phase, source=Source.FRESH)
        for _, _, first, end, phase in requests
    ]
    starts = np.cumsum([0, *(prompt + num for prompt, num, *_ in requests)]).astype(np.int32)
    return starts, steps, plans


@pytest.mark.parametrize(
    ("tokens", "length", "window"),
    [
        (range(1, 2), 2, (0, 2)),
        (range(127, 128), 300, (0, 128)),
        (range(127, 129), 300, (0, 256)),
        (range(128, 256), 300, (128, 256)),
        (range(257, 300), 300, (256, 300)),
        (range(1, 300), 300, (0, 300)),
    ],
)
def test_a_window_is_whole_blocks_around_its_tokens(tokens, length, window):
    prompt_len = 1
    reach = (tokens.start - prompt_len, tokens.stop - prompt_len)
    batch = batch_of((prompt_len, length - prompt_len, *reach, Phase.SPARSE))
    firsts, ends = window_bounds(*batch, shift=0)
    assert (firsts[0], ends[0]) == window
    assert all(firsts[0] % size == 0 for size in BLOCK_SIZES)


def test_a_dream_s_window_holds_the_place_before():
    batch = batch_of((128, 8, 0, 8, Phase.DENSE))
    assert [bound.tolist() for bound in window_bounds(*batch, shift=1)] == [[0], [136]]
    assert [bound.tolist() for bound in window_bounds(*batch, shift=0)] == [[128], [136]]


def test_a_recording_sequence_s_window_is_all_of_it():
    batch = batch_of((300, 8, 0, 8, Phase.RECORDING), (300, 8, 0, 8, Phase.DENSE))
    assert [bound.tolist() for bound in window_bounds(*batch, shift=0)] == [[0, 256], [308, 308]]


def test_the_rows_of_a_step_are_those_of_its_windows_in_order():
    starts = np.array([0, 131, 133], np.int32)
    windows = RowWindows.of(starts, np.array([128, 0]), np.array([131, 2]), torch.device("cpu"))
    assert windows.rows.tolist() == [128, 129, 130, 131, 132]
    assert windows.sizes.tolist() == [3, 2]
