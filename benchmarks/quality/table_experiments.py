# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What light steps do with SparseD's tables, in other ways than the engine's, for an experiment.

The engine records in a request's first step, and chosen tokens attend to everything.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparsed_vllm import metadata
from sparsed_vllm.attention import LayerStep, SparsedImpl
from sparsed_vllm.kernels.layout import PAGE, BlockTables, Placement
from sparsed_vllm.metadata import DENSE_LIGHT, Kind, Launch, Member
from sparsed_vllm.refresh import ContextMass, LightRows
from sparsed_vllm.steps import Phase, Plan, Step, recording_step

_CHOSEN = DENSE_LIGHT._replace(tile=32)  # no other dense launch has such tiles


@contextmanager
def recording(llm: Any, when: str) -> Iterator[None]:
    """`warm`: after SparseD's warm-up, in a step that computes all tokens, as in exact requests."""

    def step_of(plan: Plan) -> int | None:
        if plan.sparsity is None:
            return None
        step = recording_step(plan.params.steps, plan.sparsity.skip)
        return step if step < plan.num_steps else None

    with patch.object(Plan, "recording_step", property(step_of)):
        yield


@contextmanager
def listing(llm: Any, whose: str) -> Iterator[None]:
    """Chosen tokens attend to what the table lists for them (`own`), or for the canvas's first
    block (`canvas`).
    """
    chosen = ChosenTokens(whose)
    patches = [
        patch.object(ContextMass, "choose", chosen.noting(ContextMass.choose)),
        patch.object(metadata, "_members", chosen.apart(metadata._members)),
        patch.object(SparsedImpl, "_attend_densely", chosen.attending(SparsedImpl._attend_densely)),
    ]
    with ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        yield


class ChosenTokens:
    """The chosen tokens of the step that runs.

    blocks {sequence: int64 [n]}: whose lists they follow
    sizes: tokens of the tables' query blocks and key blocks
    """

    def __init__(self, whose: str) -> None:
        self.whose = whose
        self.blocks: dict[int, Tensor] = {}
        self.sizes: dict[int, tuple[int, int]] = {}

    def noting(self, choose: Any) -> Any:
        def noted(
            mass: ContextMass,
            starts: Sequence[int],
            slots: Sequence[int],
            steps: Sequence[Step],
            plans: Sequence[Plan],
            *rest: Any,
        ) -> LightRows | None:
            light = choose(mass, starts, slots, steps, plans, *rest)
            if light is not None:
                self._note(light, steps, plans)
            return light

        return noted

    def _note(self, light: LightRows, steps: Sequence[Step], plans: Sequence[Plan]) -> None:
        counts = [step.num_chosen for step in steps]
        places = light.places[len(light.places) - sum(counts) :].split(counts)
        for i, (plan, own) in enumerate(zip(plans, places, strict=True)):
            if plan.sparsity is not None:
                tile = plan.sparsity.tile
                self.sizes[i] = tile, plan.sparsity.block_size
                canvas = torch.full_like(own, plan.prompt_len // tile)
                self.blocks[i] = canvas if self.whose == "canvas" else own // tile

    def apart(self, members: Any) -> Any:
        """In a launch of their own."""

        def split(batch: Any, lengths: Any, with_flash: bool) -> dict[Kind, list[Member]]:
            found = members(batch, lengths, with_flash)
            if batch is None:
                return found
            for kind in (DENSE_LIGHT, DENSE_LIGHT._replace(is_packed=True)):
                for member in found.pop(kind, []):
                    is_sparse = batch.steps[member.seq].phase is Phase.SPARSE
                    found.setdefault(_CHOSEN if is_sparse else kind, []).append(member)
            return found

        return split

    def attending(self, attend: Any) -> Any:
        def attended(
            impl: SparsedImpl, step: LayerStep, launch: Launch, return_lse: bool
        ) -> Tensor | None:
            if launch.kind != _CHOSEN:
                return attend(impl, step, launch, return_lse)
            for _, sequence in launch.layout.sequences():
                self._attend(impl, step, sequence)
            return None

        return attended

    def _attend(self, impl: SparsedImpl, step: LayerStep, sequence: Placement) -> None:
        seq, rows, sizes = sequence.page_row, sequence.queries, self.sizes[sequence.page_row]
        pages = step.metadata.pages[seq, : -(-sequence.key_len // PAGE)].long()
        tables = impl.tables_of(step.cache, step.metadata.pages, sizes[0])
        seen = _seen(tables, pages, self.blocks[seq], *sizes)[..., : sequence.key_len]
        halves = impl.pages.keys(step.cache), impl.pages.values(step.cache)
        group = impl.num_heads // impl.num_kv_heads
        k, v = (
            half[pages].flatten(0, 1)[: sequence.key_len].repeat_interleave(group, 1).float()
            for half in halves
        )
        scores = torch.einsum("nhd,mhd->nhm", step.q[rows].float(), k) * impl.scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        step.out[rows] = torch.einsum("nhm,mhd->nhd", weights, v).to(step.out.dtype)


def _seen(tables: BlockTables, pages: Tensor, blocks: Tensor, tile: int, size: int) -> Tensor:
    """Keys that query blocks list; blocks int64 [n] -> bool [n, num_heads, keys of the pages]

    tile, size: tokens of a query block and of a key block
    """
    own, rows = pages[blocks * tile // PAGE], blocks % (PAGE // tile)
    kept, count = tables.kept[own, rows].long(), tables.num_kept[own, rows].long()
    num_blocks = len(pages) * (PAGE // size)
    listed = torch.arange(kept.shape[-1], device=kept.device) < count[..., None]
    seen = torch.zeros(*kept.shape[:2], num_blocks + 1, dtype=torch.bool, device=kept.device)
    seen.scatter_(-1, kept.where(listed, num_blocks), True)
    return seen[..., :num_blocks].repeat_interleave(size, -1)
