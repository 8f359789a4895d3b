# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The attention backend `SPARSED`: vLLM's tensors in, kernels.api called, sequence by sequence.

Every step computes a sequence whole, so keys and values come straight from the projection; pages
are neither written nor read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
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
from sparsed_vllm.kernels import api
from sparsed_vllm.pattern import Pattern
from sparsed_vllm.phases import Phase
from sparsed_vllm.windows import Windows

logger = init_logger("vllm.sparsed.attention")

_DENSE_ROWS = 64  # query rows that the dense kernels without FlashAttention work on together


def load_backend(name: str = BACKEND_NAME) -> AttentionBackendEnum:
    """The registry's member for our backend, registered if it is not yet.

    Unpickling calls this: `vllm serve` sends its configuration to an engine process that has not
    loaded any plugin yet, where the name alone would be unknown.
    """
    if name not in AttentionBackendEnum.__members__:
        path = f"{SparsedBackend.__module__}.{SparsedBackend.__qualname__}"
        AttentionBackendEnum.register(name, path)
    return AttentionBackendEnum[name]


@dataclass(frozen=True)
class Pack:
    """Consecutive sequences in a tensor of a step.

    rows: theirs in it
    cu_seqlens int32 [num_sequences + 1]: where each begins within `rows`, on the device
    lengths: their numbers of rows
    """

    rows: slice
    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @property
    def starts(self) -> list[int]:
        """cu_seqlens on the host."""
        return list(accumulate(self.lengths, initial=0))


@dataclass(frozen=True)
class Run:
    """Consecutive sequences that attend to everything, in one call.

    windows: the tokens of each whose queries there are
    """

    queries: Pack
    keys: Pack
    windows: tuple[slice, ...]

    @cached_property
    def blocks(self) -> api.QueryBlocks:
        """The run as our own kernels want it; all layers of a step share it."""
        windows = [
            api.Window(row, window.start, window.stop)
            for row, window in zip(self.queries.starts, self.windows, strict=False)
        ]
        spans = [
            api.Span(start, length, 0, window=window)
            for start, length, window in zip(
                self.keys.starts, self.keys.lengths, windows, strict=False
            )
        ]
        return api.QueryBlocks.of(spans, _DENSE_ROWS, self.keys.cu_seqlens.device)


@dataclass(frozen=True)
class Follower:
    """One sequence that attends to the key blocks of its table.

    blocks: its query blocks that q holds;  rows int64 [blocks.num_blocks]: theirs in the table
    """

    queries: slice
    tokens: slice
    pattern: Pattern
    blocks: api.QueryBlocks
    rows: Tensor


@dataclass(frozen=True)
class SparsedMetadata:
    """How the sequences of a step attend.

    narrowed: the same for queries of the step's windows alone; None if it has none
    """

    dense: tuple[Run, ...]
    recording: tuple[tuple[Run, Pattern], ...]  # one sequence each
    sparse: tuple[Follower, ...]
    narrowed: SparsedMetadata | None = None


class SparsedBackend(AttentionBackend):
    """Found by vLLM under the name SPARSED."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(api.DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = True  # there is none: pages are not read

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
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(api.HEAD_DIMS)

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True


class SparsedMetadataBuilder(AttentionMetadataBuilder[SparsedMetadata]):
    """Sorts the sequences of a step by how they attend."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # vLLM declares it abstract

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        patterns: Sequence[tuple[Phase, Pattern | None]] = (),
        windows: Windows | None = None,
    ) -> SparsedMetadata:
        """patterns: each sequence's phase and table; none for vLLM's dummy batches.

        windows: the rows that the last layer may do with; None: all
        """
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        patterns = patterns or [(Phase.DENSE, None)] * (len(starts) - 1)
        return sort_sequences(common_attn_metadata.query_start_loc, starts, patterns, windows)


def sort_sequences(
    cu_seqlens: Tensor,
    starts: Sequence[int],
    patterns: Sequence[tuple[Phase, Pattern | None]],
    windows: Windows | None = None,
) -> SparsedMetadata:
    """cu_seqlens int32 [num_sequences + 1]: where each begins;  starts: the same on the host

    patterns, windows: as in SparsedMetadataBuilder.build
    """
    tokens = _Packs(cu_seqlens, starts)
    whole = [slice(0, end - start) for start, end in pairwise(starts)]
    metadata = _Sequences(tokens, tokens, whole).sort(patterns)
    if windows is None:
        return metadata
    queries = _Packs(windows.cu_rows, windows.starts)
    return replace(metadata, narrowed=_Sequences(queries, tokens, windows.of).sort(patterns))


@dataclass(frozen=True)
class _Packs:
    """Where the sequences of a step begin in a tensor, on the device and on the host."""

    cu_seqlens: Tensor
    starts: Sequence[int]

    def of(self, first: int, end: int) -> Pack:
        """Sequences [first, end)."""
        starts = self.starts[first : end + 1]
        cu_seqlens = self.cu_seqlens[first : end + 1]
        if starts[0]:
            cu_seqlens = cu_seqlens - starts[0]
        lengths = tuple(b - a for a, b in pairwise(starts))
        return Pack(slice(starts[0], starts[-1]), cu_seqlens, lengths)

    def rows(self, i: int) -> slice:
        return slice(self.starts[i], self.starts[i + 1])


@dataclass(frozen=True)
class _Sequences:
    """The sequences of a step; windows: the tokens of each whose queries there are."""

    queries: _Packs
    keys: _Packs
    windows: Sequence[slice]

    def sort(self, patterns: Sequence[tuple[Phase, Pattern | None]]) -> SparsedMetadata:
        """patterns: each sequence's phase and table"""
        dense: list[Run] = []
        recording, sparse = [], []
        first = 0
        for i, (phase, pattern) in enumerate(patterns):
            if pattern is None:
                continue
            dense += self._runs(first, i)
            first = i + 1
            if phase is Phase.SPARSE:
                sparse.append(self._follower(i, pattern))
            else:
                recording += [(run, pattern) for run in self._runs(i, i + 1)]
        dense += self._runs(first, len(patterns))
        return SparsedMetadata(tuple(dense), tuple(recording), tuple(sparse))

    def _runs(self, first: int, end: int) -> list[Run]:
        """Sequences [first, end) as one run; none if there is no token in them."""
        if self.keys.starts[first] == self.keys.starts[end]:
            return []
        windows = tuple(self.windows[first:end])
        return [Run(self.queries.of(first, end), self.keys.of(first, end), windows)]

    def _follower(self, i: int, pattern: Pattern) -> Follower:
        tokens = (self.queries.rows(i), self.keys.rows(i))
        return Follower(*tokens, pattern, *pattern.within(self.windows[i]))


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
        scoring_scale: float | None = None,
    ) -> None:
        """scoring_scale: of block scores, where it is not the attention's own (parity tests)."""
        assert not (alibi_slopes or sliding_window or logits_soft_cap), "no model of ours has it"
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.scoring_scale = scoring_scale

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

        With fewer rows than tokens these are the rows of the step's windows. The caller's own
        shapes tell, so that a layer may always ask for all, whatever the step's windows are.
        """
        if attn_metadata is None:  # memory profiling
            return output.zero_()
        if query.shape[0] < key.shape[0]:
            assert attn_metadata.narrowed is not None
            attn_metadata = attn_metadata.narrowed
        index = extract_layer_index(layer.layer_name)
        for run in attn_metadata.dense:
            self._dense(query, key, value, run, output)
        for run, pattern in attn_metadata.recording:
            with _confined_to(output[run.queries.rows]):
                self._record(query, key, value, run, pattern, index, output)
        for follower in attn_metadata.sparse:
            with _confined_to(output[follower.queries]):
                self._follow(query, key, value, follower, index, output)
        return output

    def _follow(
        self, q: Tensor, k: Tensor, v: Tensor, follower: Follower, layer: int, out: Tensor
    ) -> None:
        """Attend to the key blocks that the follower's table lists."""
        kept, num_kept, _ = follower.pattern.of_layer(layer)
        api.block_sparse_attention(
            q[follower.queries],
            k[follower.tokens],
            v[follower.tokens],
            follower.blocks,
            kept,
            num_kept,
            follower.rows,
            scale=self.scale,
            out=out[follower.queries],
        )

    def _dense(
        self, q: Tensor, k: Tensor, v: Tensor, run: Run, out: Tensor, return_lse: bool = False
    ) -> Tensor | None:
        """Attend to everything; returns the log-sum-exp, float32 [num_heads, the run's queries]."""
        attend = dense_kernel(q.device.type, q.dtype)
        q, out = (x[run.queries.rows] for x in (q, out))
        k, v = (x[run.keys.rows] for x in (k, v))
        return attend(q, k, v, run, self.scale, out, return_lse)

    def _record(
        self, q: Tensor, k: Tensor, v: Tensor, run: Run, pattern: Pattern, layer: int, out: Tensor
    ) -> None:
        """Attend to everything, and note in `pattern` which key blocks mattered.

        The run has all queries of its sequence: later steps read other rows of the table.
        """
        # Scores of another scale need a log-sum-exp of their own.
        lse = self._dense(q, k, v, run, out, return_lse=self.scoring_scale is None)
        scores, gen_scores = api.block_scores(
            q[run.queries.rows],
            k[run.keys.rows],
            lse,
            pattern.blocks,
            scale=self.scoring_scale or self.scale,
        )
        api.select_blocks(scores, gen_scores, pattern.blocks, *pattern.of_layer(layer))


@contextmanager
def _confined_to(output: Tensor) -> Iterator[None]:
    """Let what goes wrong with one request's attention be the end of that request only.

    Its output becomes NaN and so do its logits, on all ranks, for which the scheduler ends it. A
    device that has failed as a whole raises again here, and the engine stops.
    """
    try:
        yield
    except Exception:
        logger.exception("The attention of one request failed; it ends, the others go on.")
        output.fill_(torch.nan)


DenseKernel = Callable[[Tensor, Tensor, Tensor, Run, float, Tensor, bool], Tensor | None]


@cache
def dense_kernel(device_type: str, dtype: torch.dtype) -> DenseKernel:
    """What runs the dense steps: FlashAttention where vLLM has it, else our own kernel."""
    if device_type != "cuda":
        logger.info("Dense and sparse steps run in plain torch: there is no GPU.")
        return _own_dense
    from vllm.v1.attention.backends import fa_utils

    if dtype == torch.float32 or not fa_utils.is_flash_attn_varlen_func_available():
        logger.info("Dense steps run our Triton kernel: no FlashAttention for %s here.", dtype)
        return _own_dense
    version = fa_utils.get_flash_attn_version()
    logger.info("Dense steps run FlashAttention %s.", version)
    return _flash_kernel(fa_utils.flash_attn_varlen_func, version)


def _flash_kernel(flash_attn: Callable[..., Any], version: int | None) -> DenseKernel:
    def dense(
        q: Tensor, k: Tensor, v: Tensor, run: Run, scale: float, out: Tensor, return_lse: bool
    ) -> Tensor | None:
        _, lse = flash_attn(
            q,
            k,
            v,
            max_seqlen_q=max(run.queries.lengths),
            cu_seqlens_q=run.queries.cu_seqlens,
            max_seqlen_k=max(run.keys.lengths),
            cu_seqlens_k=run.keys.cu_seqlens,
            softmax_scale=scale,
            causal=False,
            return_softmax_lse=True,
            out=out,
            fa_version=version,
        )[:2]
        return lse if return_lse else None  # it comes for nothing

    return dense


def _own_dense(
    q: Tensor, k: Tensor, v: Tensor, run: Run, scale: float, out: Tensor, return_lse: bool
) -> Tensor | None:
    result = api.dense_attention(q, k, v, run.blocks, scale=scale, out=out, return_lse=return_lse)
    return result[1] if return_lse else None
