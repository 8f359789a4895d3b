# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""CUDA graphs of light steps: the whole forward pass of a few rows, attention included.

The host needs longer to launch such a pass, kernel by kernel, than the GPU to run it.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed.parallel_state import graph_capture, is_global_first_rank
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.input_batch import InputBuffers

from sparsed_vllm.batch import DenoisingBatch
from sparsed_vllm.flash import PackedSequences
from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.layout import (
    KEY_LEN,
    NUM_COLUMNS,
    BatchLayout,
    LightTensors,
    host_layout,
    send_into,
)
from sparsed_vllm.metadata import (
    DENSE_ROWS,
    FEW_ROWS,
    Launch,
    MassRows,
    SparsedMetadata,
    light_kind,
)
from sparsed_vllm.pages import PageWrites
from sparsed_vllm.steps import Phase, Source, Step

logger = init_logger("vllm.sparsed.graphs")

ROW_COUNTS = (*range(16, 129, 16), *range(160, 513, 32))
"""Rows that graphs are captured for; a step of more keeps the GPU busy without."""
ROWS_A_SEQUENCE = 32  # of graphs for several sequences


class GraphSize(NamedTuple):
    """The most rows and sequences of a step that a graph runs."""

    num_rows: int
    num_seqs: int

    @property
    def rows_a_sequence(self) -> int:
        """The most rows of one of its sequences; of several all attend by our kernel."""
        return self.num_rows if self.num_seqs == 1 else min(self.num_rows, FEW_ROWS)


class LightInputs:
    """What a captured light step reads, at fixed addresses.

    Rows of a graph that belong to no sequence write their keys and values to page 0, which vLLM
    gives to nobody.
    """

    def __init__(self, size: GraphSize, longest: int, device: torch.device) -> None:
        """longest: tokens of the longest sequence"""
        rows, seqs = size
        self.size, self.longest = size, longest
        self._numbers = torch.zeros(
            2 * NUM_COLUMNS * seqs + seqs + 1, dtype=torch.int32, device=device
        )
        columns = self._numbers[: 2 * NUM_COLUMNS * seqs].view(2, NUM_COLUMNS, seqs)
        self.layout, self.mass_layout = map(self._layout, columns)
        self.cu_queries = self._numbers[2 * NUM_COLUMNS * seqs :]
        self.slots = torch.zeros(seqs, dtype=torch.int64, device=device)
        self.rows = LightTensors.empty(rows, device)

    def metadata(self, pages: Tensor, mass: Tensor) -> SparsedMetadata:
        """What attention is captured with: the tensors of this object, and bounds on the host.

        pages int32 [num_reqs, most pages]: vLLM's page table;  mass: as in ContextMass
        """
        rows, seqs = self.size
        pages = pages[:seqs]
        kind, packed = light_kind(self.size.rows_a_sequence, with_flash=True), None
        if kind.is_packed:
            arguments = {"seqused_k": self.layout.columns[KEY_LEN], "block_table": pages}
            packed = PackedSequences(
                slice(0, rows), None, self.cu_queries, rows, self.longest, arguments
            )
        noted = MassRows(self.rows.read_rows, self.mass_layout, self.rows.weights, self.slots)
        launch = Launch(kind, self.layout, packed, mass=noted)
        writes = PageWrites(slice(rows), self.rows.pages, self.rows.offsets)
        return SparsedMetadata((launch,), (), pages, writes, mass)

    def _layout(self, columns: Tensor) -> BatchLayout:
        """A layout whose sequences may be of any size."""
        seqs = self.size.num_seqs
        sizes = np.full((2, seqs), [[self.size.rows_a_sequence], [self.longest]])
        return BatchLayout(DENSE_ROWS, _columns(np.zeros(seqs, np.int32), *sizes), columns)

    def fill(self, batch: DenoisingBatch, pages: Tensor) -> None:
        """Write a step of light requests, after whatever read the one before.

        pages int32 [num_reqs, most pages]: vLLM's page table
        """
        light, reads = batch.light, batch.reads
        assert light is not None and len(light.rows) == batch.starts[-1]
        ends = np.full(self.size.num_seqs + 1, batch.starts[-1])
        ends[: len(batch.starts)] = batch.starts
        parts = [self._rows_of(batch), self._mass_of(batch), ends]
        host = np.concatenate([part.ravel() for part in parts]).astype(np.int32)
        send_into(self._numbers, host)
        if reads is not None:
            send_into(self.slots[: len(reads.slots)], np.array(reads.slots))
        of_reads = None if reads is None else reads.rows
        api.write_light_inputs(self.rows, light.rows, light.places, light.seqs, pages, of_reads)

    def _rows_of(self, batch: DenoisingBatch) -> NDArray[np.int32]:
        """The columns of what each sequence computes."""
        return self._columns_of(batch, batch.starts[:-1], np.diff(batch.starts))

    def _mass_of(self, batch: DenoisingBatch) -> NDArray[np.int32]:
        """The columns of the rows whose mass is noted, among those that are read; often none."""
        starts, counts = np.zeros((2, len(batch.requests)), np.int32)
        if batch.reads is not None:
            for seq, (first, count) in batch.reads.spans.items():
                starts[seq], counts[seq] = first, count
        return self._columns_of(batch, starts, counts)

    def _columns_of(
        self, batch: DenoisingBatch, starts: NDArray[np.int32], counts: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """Rows `starts` on of q, `counts` of them, of each sequence; none of those that lack."""
        lengths = np.array([step.length for step in batch.steps])
        given = np.zeros((3, self.size.num_seqs), np.int32)
        given[:, : len(lengths)] = starts, counts, lengths
        return _columns(*given)


def _columns(
    starts: NDArray[Any], counts: NDArray[Any], lengths: NDArray[Any]
) -> NDArray[np.int32]:
    """Of one sequence for each row of the page table: rows of q, and tokens."""
    return host_layout(
        DENSE_ROWS,
        query_starts=starts,
        num_rows=counts,
        key_lens=lengths,
        page_rows=np.arange(len(starts)),
    )


class LightGraph:
    """A captured pass, which runs on what `inputs` and vLLM's input buffers hold."""

    def __init__(
        self, inputs: LightInputs, run: Callable[[], Tensor], out: Tensor, config: VllmConfig
    ) -> None:
        """run: the pass; it has run before, so that all its kernels are compiled

        out [rows, hidden_size]: where its result is left
        """
        self.inputs = inputs
        self.out = out
        self._graph = torch.cuda.CUDAGraph()
        with (
            capture_pool(current_platform.get_global_graph_pool(), config) as pool,
            torch.cuda.graph(self._graph, pool, stream=torch.cuda.current_stream()),
        ):
            out.copy_(run())

    def replay(self) -> Tensor:
        """The hidden states of all rows, [rows, hidden_size]; the next replay overwrites them."""
        self._graph.replay()
        return self.out


class LightGraphs:
    """The graphs of an engine, by size: none until they are captured, at its start."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.vllm_config = vllm_config
        self.device = device
        self._graphs: dict[GraphSize, LightGraph] = {}  # the smallest first

    def find(self, batch: DenoisingBatch) -> LightGraph | None:
        """The smallest graph that runs a step; None where none does."""
        num_rows, num_seqs = int(batch.starts[-1]), len(batch.requests)
        longest = int(np.diff(batch.starts).max())
        for size, graph in self._graphs.items():
            fits = size.num_rows >= num_rows and size.num_seqs >= num_seqs
            if fits and size.rows_a_sequence >= longest:
                return graph if all(map(is_light, batch.steps)) else None
        return None

    def sizes(self) -> list[GraphSize]:
        """What is captured: for one sequence, and for several of ROWS_A_SEQUENCE rows each."""
        scheduler = self.vllm_config.scheduler_config
        return sorted(
            GraphSize(rows, seqs)
            for rows in ROW_COUNTS
            if rows <= scheduler.max_num_batched_tokens
            for seqs in {1, min(scheduler.max_num_seqs, rows // ROWS_A_SEQUENCE)} - {0}
        )

    def forget(self) -> None:
        """Free the graphs."""
        self._graphs = {}

    def capture(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        buffers: InputBuffers,
        layer_names: Sequence[str],
        pages: Tensor,
        mass: Tensor,
    ) -> None:
        """Capture all sizes; the largest comes first, whose memory the others share.

        model: input_ids, positions [rows] -> hidden states [rows, hidden_size]
        pages int32 [max_num_seqs, most pages]: vLLM's page table;  mass: as in ContextMass
        """
        self.forget()
        longest = self.vllm_config.model_config.max_model_len
        begin, (free, _) = time.perf_counter(), torch.accelerator.get_memory_info()
        out, graphs = None, {}
        with graph_capture(self.device):
            for size in _with_progress(self.sizes()[::-1]):
                inputs = LightInputs(size, longest, self.device)
                metadata = dict.fromkeys(layer_names, inputs.metadata(pages, mass))
                run = partial(self._run, model, buffers, size.num_rows, metadata)
                hidden_states = run()
                out = torch.empty_like(hidden_states) if out is None else out
                own = out[: size.num_rows]
                graphs[size] = LightGraph(inputs, run, own, self.vllm_config)
        self._graphs = dict(sorted(graphs.items()))
        seconds, taken = time.perf_counter() - begin, free - torch.accelerator.get_memory_info()[0]
        logger.info(
            "Light steps: %d CUDA graphs, %.1f s, %d MiB.", len(graphs), seconds, taken >> 20
        )

    def _run(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        buffers: InputBuffers,
        num_rows: int,
        metadata: dict[str, SparsedMetadata],
    ) -> Tensor:
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=num_rows,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,  # of vLLM's own graphs, of parts of a pass
            slot_mapping={},
        ):
            return model(buffers.input_ids[:num_rows], buffers.positions[:num_rows])


def is_light(step: Step) -> bool:
    """Whether a step attends to all pages of its sequence, as captured ones do."""
    return step.source is Source.PAGES and step.phase is Phase.DENSE


def _with_progress(sizes: list[GraphSize]) -> Iterable[GraphSize]:
    return tqdm(sizes, desc="Capturing light steps", disable=not is_global_first_rank())
