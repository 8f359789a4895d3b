# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The rows that the last layer computes."""

import pytest
import torch

from sparsed_vllm.kernels.api import BLOCK_SIZES
from sparsed_vllm.windows import Windows, window_around


@pytest.mark.parametrize(
    ("tokens", "length", "window"),
    [
        (range(0, 1), 1, (0, 1)),
        (range(127, 128), 300, (0, 128)),
        (range(127, 129), 300, (0, 256)),
        (range(128, 256), 300, (128, 256)),
        (range(257, 300), 300, (256, 300)),
        (range(0, 300), 300, (0, 300)),
    ],
)
def test_a_window_is_whole_blocks_around_its_tokens(tokens, length, window):
    found = window_around(tokens, length)
    assert (found.start, found.stop) == window
    assert all(found.start % size == 0 for size in BLOCK_SIZES)


def test_the_rows_of_a_step_are_those_of_its_windows_in_order():
    windows = Windows.at([slice(128, 131), slice(0, 2)], [0, 131, 133], torch.device("cpu"))
    assert windows.rows.tolist() == [128, 129, 130, 131, 132]
    assert windows.cu_rows.tolist() == list(windows.starts) == [0, 3, 5]
    assert windows.cu_rows.dtype == torch.int32
