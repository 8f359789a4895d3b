# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Which tokens of the context a light step computes anew: those that its canvas attended to most,
or that match what was filled.

How many is in the request's plan; which, only the device knows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsed_vllm.kernels.canvas import OpenRows
from sparsed_vllm.kernels.layout import places_within, send
from sparsed_vllm.match import PromptMatch
from sparsed_vllm.steps import Plan, Source, Step

_RANKED_AT_ONCE = 1 << 21  # tokens of sequences that choose, padded to the longest
_BYTES_RANKED = 160  # of each: copies of its mass and id, and what sorting them takes


@dataclass(frozen=True)
class ReadRows:
    """The rows that a step reads of requests whose next step chooses tokens by their attention.

    spans: of each such sequence, the first of its rows among all that are read, and their number
    rows: all that are read
    slots: of all sequences of the batch
    """

    spans: Mapping[int, tuple[int, int]]
    rows: OpenRows
    slots: Sequence[int]

    @property
    def weights(self) -> Tensor:
        """1 for a row that is read, 0 for padding; float32 [num_rows]"""
        return (self.rows.places >= 0).float()


@dataclass(frozen=True)
class LightRows:
    """The rows of a batch that light steps compute.

    rows int64 [n]: of the batch;  places int64 [n]: theirs in their sequences
    seqs int64 [n]: whose they are, in batch order
    """

    rows: Tensor
    places: Tensor
    seqs: Tensor


class ContextMass:
    """How much softmax mass each request's masked places put on each token of its sequence.

    mass float32 [num_slots, longest]: summed over layers, heads and rows, since it was cleared
    """

    def __init__(
        self,
        num_slots: int,
        longest: int,
        device: torch.device,
        add_ranks: Callable[[Tensor], Tensor],
        match: PromptMatch | None = None,
    ) -> None:
        """add_ranks: sums a tensor over tensor-parallel ranks, each of which has its own heads

        match: for requests that choose by it
        """
        self.mass = torch.zeros(num_slots, longest, device=device)
        self._add_ranks = add_ranks
        self.match = match

    def clear(self, slots: Sequence[int]) -> None:
        """Begin a new step of these requests."""
        if slots:
            self.mass.index_fill_(0, send(np.array(slots), self.mass.device), 0.0)

    def renew(self, slots: Sequence[int], steps: Sequence[Step], plans: Sequence[Plan]) -> None:
        """Note which requests compute tokens of their prompt in a step; once it has chosen."""
        if self.match is not None:
            self.match.renew(
                [
                    slot
                    for slot, step, plan in zip(slots, steps, plans, strict=True)
                    if plan.reuse is not None and plan.reuse.by_match
                    if step.source is Source.FRESH or step.num_chosen
                ]
            )

    def choose(
        self,
        starts: Sequence[int],
        slots: Sequence[int],
        steps: Sequence[Step],
        plans: Sequence[Plan],
        tokens: Tensor | None = None,
    ) -> LightRows | None:
        """The rows of the light steps of a batch; None if it has none.

        starts: where each sequence begins in the batch
        tokens int32 [num_slots, longest]: of each slot, the prompt first; needed to choose by match
        """
        light = [i for i, step in enumerate(steps) if step.source is Source.PAGES]
        if not light:
            return None
        known = []
        for i in light:
            places = np.arange(steps[i].first_row, steps[i].length)
            rows = starts[i] + steps[i].num_chosen + np.arange(len(places))
            known.append(np.stack([rows, places, np.full(len(places), i)]))
        found = send(np.concatenate(known, axis=1), self.mass.device)
        parts = [found]
        for some in _at_once([i for i in light if steps[i].num_chosen], steps):
            ends = [steps[i].first_row for i in some]
            own = [slots[i] for i in some], [plans[i] for i in some]
            parts.append(_chosen(starts, steps, some, self._best(ends, *own, tokens)))
        return LightRows(*torch.cat(parts, dim=1))

    def hold(self) -> None:
        """Take, for a moment, what the largest choice needs: for memory profiling."""
        num_slots, longest = self.mass.shape
        largest = min(num_slots * longest, max(longest, _RANKED_AT_ONCE))
        torch.empty(largest * _BYTES_RANKED, dtype=torch.uint8, device=self.mass.device)

    def _best(
        self,
        ends: Sequence[int],
        slots: Sequence[int],
        plans: Sequence[Plan],
        tokens: Tensor | None,
    ) -> Tensor:
        """Places before `ends` by what their request chooses by, the best first.

        int64 [len(slots), max(ends)]
        """
        columns = send(np.array([slots, ends]), self.mass.device)
        mass = self._add_ranks(self.mass[columns[0], : max(ends)])
        is_behind = torch.arange(mass.shape[1], device=mass.device) >= columns[1][:, None]
        if any(plan.reuse is not None and plan.reuse.by_match for plan in plans):
            assert self.match is not None and tokens is not None
            mass = self.match.weigh(mass.masked_fill(is_behind, 0), ends, slots, plans, tokens)
        # Stable, so that equal ones are told apart by place and never by batch mates.
        return mass.masked_fill(is_behind, -1).argsort(dim=1, descending=True, stable=True)


def _at_once(seqs: Sequence[int], steps: Sequence[Step]) -> Iterator[list[int]]:
    """Sequences that are ranked together: as many as rows of the longest's length have room for."""
    part: list[int] = []
    longest = 0
    for i in seqs:
        longest = max(longest, steps[i].first_row)
        if part and longest * (len(part) + 1) > _RANKED_AT_ONCE:
            yield part
            part, longest = [], steps[i].first_row
        part.append(i)
    if part:
        yield part


def _chosen(
    starts: Sequence[int], steps: Sequence[Step], seqs: Sequence[int], best: Tensor
) -> Tensor:
    """Rows, places and sequences of the chosen tokens, int64 [3, n].

    best int64 [len(seqs), places]: the places of each, the best first
    """
    counts = np.array([steps[i].num_chosen for i in seqs])
    which = np.repeat(np.arange(len(seqs)), counts)
    ranks = places_within(counts)
    rows = np.array([starts[i] for i in seqs])[which] + ranks
    table = send(np.stack([which, ranks, rows, np.array(seqs)[which]]), best.device)
    return torch.stack([table[2], best[table[0], table[1]], table[3]])
