# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The attention backend `SPARSED`: a layer's q, k and v in, one kernel's call a launch out.

One launch serves all sequences of a step that attend to everything, one all that record a table,
and one all that follow theirs, for each block size among them (metadata.py). Keys and values come
straight from the projection and, in light steps, from pages for what they do not compute.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from sparsed_vllm.admission import BACKEND_NAME
from sparsed_vllm.batch import DenoisingBatch, RowWindows
from sparsed_vllm.flash import flash_attention
from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.layout import (
    NUM_ROWS,
    PAGE,
    PAGE_ROW,
    QUERY_START,
    BatchLayout,
    BlockTables,
    Selection,
    num_blocks,
)
from sparsed_vllm.metadata import Launch, SparsedMetadata, plan_launches
from sparsed_vllm.pages import PageLayout
from sparsed_vllm.steps import Source

logger = init_logger("vllm.sparsed.attention")

_SCORES_BYTES = 1 << 29  # of block scores at once; heads that do not fit wait for the others
_PARTS_BYTES = 1 << 28  # of light steps: 17 MB for each sequence of more than some 1k tokens


def load_backend(name: str = BACKEND_NAME) -> AttentionBackendEnum:
    """The registry's member for our backend, registered if it is not yet.

    Unpickling calls this: `vllm serve` sends its configuration to an engine process that has not
    loaded any plugin yet, where the name alone would be unknown.
    """
    if name not in AttentionBackendEnum.__members__:
        path = f"{SparsedBackend.__module__}.{SparsedBackend.__qualname__}"
        AttentionBackendEnum.register(name, path)
    return AttentionBackendEnum[name]


class LayerStep(NamedTuple):
    """A layer's part of a step.

    q, out [rows, num_heads, head_size];  k, v [tokens, num_kv_heads, head_size]
    cache: the layer's pages, as vLLM allocates them
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cache: Tensor
    metadata: SparsedMetadata
    out: Tensor


Noted = tuple[Launch, Tensor | None]
"""A launch and the log-sum-exp of its rows, float32 [num_heads, rows], where it is needed."""


class SparsedBackend(AttentionBackend):
    """Found by vLLM under the name SPARSED."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(api.DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = True  # of the requests that reuse keys and values

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[SparsedImpl]:
        return SparsedImpl

    @staticmethod
    def get_builder_cls() -> type[SparsedMetadataBuilder]:
        return SparsedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [PAGE]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(api.HEAD_DIMS)

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True


class SparsedMetadataBuilder(AttentionMetadataBuilder[SparsedMetadata]):
    """Sorts the sequences of a step by how they attend."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], *args: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, *args)
        dtype = self.vllm_config.model_config.dtype
        self.with_flash = flash_attention(self.device.type, dtype) is not None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        batch: DenoisingBatch | None = None,
        windows: RowWindows | None = None,
    ) -> SparsedMetadata:
        """batch: None for vLLM's dummy batches, which attend to everything

        windows: the rows that the last layer computes; None: all
        """
        starts = common_attn_metadata.query_start_loc_cpu.numpy()
        pages = common_attn_metadata.block_table_tensor
        return plan_launches(
            starts,
            pages,
            batch,
            windows,
            with_flash=self.with_flash,
        )


class SparsedImpl(AttentionImpl):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        *,
        pages: PageLayout,
        max_num_tokens: int,
        max_model_len: int,
        notes_mass: bool = True,
    ) -> None:
        """pages: what the layer's pages hold;  max_*: of a step and of a sequence

        notes_mass: whether the layer's attention has a say in what light steps compute
        """
        assert not (alibi_slopes or sliding_window or logits_soft_cap), "no model of ours has it"
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.pages = pages
        self.max_num_tokens = max_num_tokens
        self.max_model_len = max_model_len
        self.notes_mass = notes_mass
        self._tables: dict[tuple[int, int], BlockTables] = {}

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SparsedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output [rows, num_heads, head_size]; key, value [tokens, num_kv_heads, ...]

        Where a kernel of a table fails, the step is run again sequence by sequence, so that only
        those fail for which it does.
        """
        if attn_metadata is None:  # memory profiling
            self._hold_scores(query)
            return output.zero_()
        step = LayerStep(query, key, value, kv_cache, attn_metadata, output)
        try:
            self.attend(step)
        except AssertionError:
            raise
        except Exception:
            logger.exception("Attention failed; it is tried again request by request.")
            self._attend_one_by_one(step)
        return output

    def attend(self, step: LayerStep) -> None:
        """Attention of all sequences of a step; raises what a kernel raises."""
        fresh, noted = self._attend_to_all(step)
        for launch in step.metadata.tables:
            noted.append((launch, self._use_tables(step, launch, fresh)))
        self._note_mass(step, noted)

    def _attend_one_by_one(self, step: LayerStep) -> None:
        """The same, where what goes wrong with one request's table ends that request only.

        Its output becomes NaN and so do its logits, on all ranks, for which the scheduler ends it.
        A device that has failed as a whole raises again here, and the engine stops.
        """
        fresh, noted = self._attend_to_all(step)
        for launch in step.metadata.tables:
            for seq in range(launch.layout.num_seqs):
                one = launch.only(seq)
                try:
                    noted.append((one, self._use_tables(step, one, fresh)))
                except AssertionError:
                    raise
                except Exception:
                    logger.exception("The attention of one request failed; the others go on.")
                    self._fail(step, one.layout)
        self._note_mass(step, noted)

    def _attend_to_all(self, step: LayerStep) -> tuple[Tensor | None, list[Noted]]:
        """Dense attention; returns the log-sum-exp over the step's own keys, if a table needs it,
        and each launch with its own.

        Keys and values are kept before anything attends.
        """
        if step.metadata.writes is not None:
            step.metadata.writes.write(step.k, step.v, *self.pages.halves(step.cache))
        records = any(launch.selection is not None for launch in step.metadata.tables)
        fresh, noted = None, []
        for launch in step.metadata.dense:
            is_fresh = launch.kind.source is Source.FRESH
            return_lse = self._notes(launch) or (records and is_fresh)
            lse = self._attend_densely(step, launch, return_lse)
            noted.append((launch, lse))
            fresh = lse if is_fresh else fresh
        return fresh, noted

    def _attend_densely(self, step: LayerStep, launch: Launch, return_lse: bool) -> Tensor | None:
        options: dict[str, Any] = {
            "scale": self.scale,
            "out": step.out,
            "return_lse": return_lse,
        }
        if launch.packed is not None:
            flash = flash_attention(step.q.device.type, step.q.dtype)
            assert flash is not None
            own = self.pages.halves(step.cache) if launch.packed.keys is None else (step.k, step.v)
            return flash(step.q, *own, launch.packed, **options)
        if launch.kind.source is Source.FRESH:
            result = api.dense_attention(step.q, step.k, step.v, launch.layout, **options)
        else:
            where = (*self.pages.halves(step.cache), launch.layout, step.metadata.pages)
            result = api.paged_attention(step.q, *where, **options)
        return result[1] if return_lse else None

    def _use_tables(self, step: LayerStep, launch: Launch, lse: Tensor | None) -> Tensor | None:
        """Record the sequences' tables, or attend to what they list.

        Returns the log-sum-exp over listed keys, where it is noted.
        """
        tables = self.tables_of(step.cache, step.metadata.pages, launch.layout.tile)
        if launch.selection is not None:
            assert lse is not None
            self._record(step, launch.layout, launch.selection, lse, tables)
            return None
        return_lse = self._notes(launch)
        options: dict[str, Any] = {
            "scale": self.scale,
            "out": step.out,
            "return_lse": return_lse,
        }
        if launch.kind.source is Source.FRESH:
            where = (step.k, step.v, launch.layout, tables)
            result = api.block_sparse_attention(step.q, *where, **options)
        else:
            where = (*self.pages.halves(step.cache), launch.layout, tables)
            result = api.paged_block_sparse_attention(step.q, *where, **options)
        return result[1] if return_lse else None

    def _record(
        self,
        step: LayerStep,
        layout: BatchLayout,
        selection: Selection,
        lse: Tensor,
        tables: BlockTables,
    ) -> None:
        """Write the sequences' tables, as many heads at once as their scores have room for."""
        group = self.num_heads // self.num_kv_heads
        size = self._kv_heads_at_once(layout.num_tiles, layout.max_key_blocks)
        for first in range(0, self.num_kv_heads, size):
            keys = slice(first, first + size)
            heads = slice(first * group, (first + size) * group)
            part = BlockTables(tables.kept[:, :, heads], tables.num_kept[:, :, heads], tables.pages)
            q, k = step.q[:, heads], step.k[:, keys]
            scores = api.block_scores(q, k, lse[heads], layout, selection, scale=self.scale)
            api.select_blocks(*scores, layout, selection, part)

    def _notes(self, launch: Launch) -> bool:
        return self.notes_mass and launch.mass is not None

    def _note_mass(self, step: LayerStep, noted: list[Noted]) -> None:
        """Add the mass that rows of launches put on their sequences' tokens.

        Once all have attended, so that none counts twice where the step is run again.
        """
        for launch, lse in noted:
            mass = launch.mass
            if mass is None or not self.notes_mass:
                continue
            assert lse is not None and step.metadata.mass is not None
            api.token_mass(
                step.q[mass.rows],
                self.pages.keys(step.cache),
                lse[:, mass.rows],
                mass.layout,
                step.metadata.pages,
                mass.weights,
                mass.slots,
                step.metadata.mass,
                scale=self.scale,
            )

    def _kv_heads_at_once(self, query_blocks: int, key_blocks: int) -> int:
        """Key heads whose query heads' block scores fit _SCORES_BYTES together; at least one."""
        each = self._scores_bytes(query_blocks, key_blocks) // self.num_kv_heads
        return max(1, min(self.num_kv_heads, _SCORES_BYTES // each))

    def _scores_bytes(self, query_blocks: int, key_blocks: int) -> int:
        return 2 * self.num_heads * query_blocks * key_blocks * torch.float32.itemsize

    def _hold_scores(self, q: Tensor) -> None:
        """Take, for a moment, what the block scores of the largest recording step need.

        Where requests may reuse keys and values, also what splits of long sequences find.
        """
        smallest = min(api.BLOCK_SIZES)
        sizes = [num_blocks(n, smallest) for n in (self.max_num_tokens, self.max_model_len)]
        heads = self._kv_heads_at_once(*sizes)
        nbytes = self._scores_bytes(*sizes) * heads // self.num_kv_heads
        if self.pages.holds_kv:
            nbytes = max(nbytes, _PARTS_BYTES)
        torch.empty(nbytes, dtype=torch.uint8, device=q.device)

    def tables_of(self, cache: Tensor, pages: Tensor, query_block_size: int) -> BlockTables:
        """The layer's tables of sequences with these pages."""
        key = (cache.data_ptr(), query_block_size)
        if key not in self._tables:
            self._tables[key] = self.pages.block_tables(cache, pages, query_block_size)
        tables = self._tables[key]
        return BlockTables(tables.kept, tables.num_kept, pages)

    def _fail(self, step: LayerStep, layout: BatchLayout) -> None:
        """End a sequence: NaN for all to see, and a table that lists nothing."""
        start, count = int(layout.host[QUERY_START, 0]), int(layout.host[NUM_ROWS, 0])
        step.out[start : start + count].fill_(torch.nan)
        pages = step.metadata.pages[int(layout.host[PAGE_ROW, 0])]
        owned = pages[: num_blocks(layout.max_key_len, PAGE)].long()
        self.tables_of(step.cache, step.metadata.pages, layout.tile).num_kept[owned] = 0
