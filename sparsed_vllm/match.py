# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Which prompt tokens match what the canvas was filled with, as a reason to compute them anew.

A place that is filled with a word of the prompt changes what the prompt says of that word. Rare
words tell more than frequent ones.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparsed_vllm.canvases import Canvases
from sparsed_vllm.kernels.layout import send
from sparsed_vllm.steps import Plan


class PromptMatch:
    """Scores prompt tokens by the ids that were filled since the request's prompt was renewed.

    masked bool [num_slots + 1, longest]: places of the canvases that were masked then
    """

    def __init__(self, canvases: Canvases) -> None:
        self.canvases = canvases
        self.masked = torch.zeros_like(canvases.masked)

    def renew(self, slots: Sequence[int]) -> None:
        """What has been filled so far is known to these requests' prompts from now on."""
        if slots:
            own = send(np.array(slots), self.masked.device)
            self.masked[own] = self.canvases.masked[own]

    def weigh(
        self,
        mass: Tensor,
        ends: Sequence[int],
        slots: Sequence[int],
        plans: Sequence[Plan],
        tokens: Tensor,
    ) -> Tensor:
        """What each request chooses by, float64 [n, width].

        mass float32 [n, width]: by attention, 0 from `ends` on, where nothing may be chosen
        tokens int32 [num_slots, longest]: of each slot, the prompt first
        """
        ways = [(r.by_attention, r.by_match) for plan in plans if (r := plan.reuse) is not None]
        # What is counted may depend on nothing but the request itself.
        lengths = [min(plan.prompt_len, end) for plan, end in zip(plans, ends, strict=True)]
        columns = np.array([slots, lengths, *zip(*ways, strict=True)])
        own, num_prompt, by_attention, by_match = send(columns, mass.device)[:, :, None]
        longest = max(plan.params.num_tokens for plan in plans)
        ids = tokens[own[:, 0], : mass.shape[1]]
        places = torch.arange(mass.shape[1], device=mass.device)
        ids = ids.masked_fill(places >= num_prompt, _NO_PROMPT)
        match = _rarity(ids) * _is_among(ids, self._filled(own[:, 0], longest))
        both = _shares(mass) + _shares(match)
        return torch.where(by_match > 0, torch.where(by_attention > 0, both, match), mass.double())

    def _filled(self, slots: Tensor, longest: int) -> Tensor:
        """Ids of the places that were filled since, int32 [n, longest], ascending."""
        is_new = self.masked[slots, :longest] & ~self.canvases.masked[slots, :longest]
        filled = self.canvases.tokens[slots, :longest].masked_fill(~is_new, _NO_CANVAS)
        return filled.sort(1).values


_NO_PROMPT, _NO_CANVAS = -1, -2  # ids of what is behind a prompt, and of places not filled


def _rarity(ids: Tensor) -> Tensor:
    """1 / how often an id occurs in its row; ids [n, width] -> float64 [n, width]"""
    ordered = ids.sort(1).values
    ends = torch.searchsorted(ordered, ids, right=True)
    return 1 / (ends - torch.searchsorted(ordered, ids)).double()


def _is_among(ids: Tensor, ordered: Tensor) -> Tensor:
    """Whether each of ids [n, width] is in its row of ordered [n, m], which ascends."""
    places = torch.searchsorted(ordered, ids).clamp(max=ordered.shape[1] - 1)
    return ordered.gather(1, places) == ids


def _shares(values: Tensor) -> Tensor:
    """values [n, width], at least 0, by their sum, or 0 where that is 0; float64 [n, width]

    Integers are summed: their sum is the same in any order, and that depends on batch mates.
    """
    whole = (values.double() * 2**32).long()
    return whole / whole.sum(1, keepdim=True).clamp(min=1)
