# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The places that one request fills: their tokens, and which of them are still masked."""

import torch
from torch import Tensor


class Canvas:
    """One request's places on the device, filled block by block.

    tokens int64 [num_tokens]: the token of each place, the mask token where it is masked
    masked bool [num_tokens]: the record of what is masked; never inferred from the token
    block_length: places denoised together
    """

    def __init__(self, tokens: Tensor, masked: Tensor, block_length: int) -> None:
        self.tokens = tokens
        self.masked = masked
        self.block_length = block_length
        self._block_of = torch.arange(len(tokens), device=tokens.device) // block_length

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def open_places(self, count: int, end: int | None = None) -> Tensor:
        """The masked places of the first unfinished block, ascending.

        count: how many there are, or a bound on it, so that the host need not ask the device.
        end: no place from there on is open; None: the canvas's end
        Returns int64 [count], -1 beyond the last.
        """
        is_open = self.masked & (self._block_of == self._first_masked() // self.block_length)
        return torch.nonzero_static(is_open[:end], size=count, fill_value=-1).squeeze(-1)

    def fill(self, places: Tensor, tokens: Tensor, chosen: Tensor) -> None:
        """Put `tokens` where `chosen`; the other places stay as they are.

        places, tokens int64 [count], chosen bool [count]: False where a place is -1.
        """
        # A place that is not chosen writes what it holds. Padding (-1) would alias the last
        # place, so it is sent to a place of its own, one past the end.
        places = torch.where(chosen, places, self.num_tokens)
        self.tokens = self._scatter(self.tokens, places, tokens)
        self.masked = self._scatter(self.masked, places, torch.zeros_like(chosen))

    def _scatter(self, values: Tensor, places: Tensor, new: Tensor) -> Tensor:
        longer = torch.cat([values, values[:1]])
        return longer.scatter(0, places, new)[: self.num_tokens]

    def num_final(self) -> Tensor:
        """How many places lie in finished blocks; int64 [], on the device."""
        finished = self._first_masked() // self.block_length * self.block_length
        return torch.where(self.masked.any(), finished, self.num_tokens)

    def _first_masked(self) -> Tensor:
        """The first masked place, or 0 if none is; int64 []."""
        return self.masked.int().argmax()
