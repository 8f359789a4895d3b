# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The rows that the last layer computes: query blocks whose logits a step reads, or a table asks.

Windows begin and end with blocks of the largest size, so that every kernel meets the blocks that
it meets in the other layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

_BLOCK = 128  # tokens: a multiple of every block size


def window_around(tokens: range, length: int) -> slice:
    """The smallest window that holds `tokens` of a sequence of `length`; slice(start, end)."""
    return slice(tokens.start // _BLOCK * _BLOCK, min(-(-tokens.stop // _BLOCK) * _BLOCK, length))


@dataclass(frozen=True)
class Windows:
    """The windows of a step, laid end to end.

    of: tokens [start, end) of each sequence
    starts [num_sequences + 1]: where each begins among the rows of all
    cu_rows int32 [num_sequences + 1]: the same on the device
    rows int64 [starts[-1]]: which rows of the batch they are
    """

    of: tuple[slice, ...]
    starts: tuple[int, ...]
    cu_rows: Tensor
    rows: Tensor

    @classmethod
    def at(
        cls, windows: Sequence[slice], query_starts: Sequence[int], device: torch.device
    ) -> "Windows":
        """query_starts: where each sequence begins in the batch"""
        lengths = [window.stop - window.start for window in windows]
        starts = tuple(accumulate(lengths, initial=0))
        shifts = [
            first + window.start - start
            for first, window, start in zip(query_starts, windows, starts, strict=False)
        ]
        # One small copy; the rows themselves are made on the device.
        table = torch.tensor([starts, [*lengths, 0], [*shifts, 0]]).to(device, non_blocking=True)
        shift = table[2].repeat_interleave(table[1], output_size=starts[-1])
        rows = torch.arange(starts[-1], device=device) + shift
        return cls(tuple(windows), starts, table[0].int(), rows)
