# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The worker's side of denoising: each step's token ids, attention metadata and logits rows."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata, ModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from sparsed_vllm.admission import RequestReader
from sparsed_vllm.attention import SparsedImpl, SparsedMetadataBuilder
from sparsed_vllm.batch import (
    DenoisingBatch,
    DenoisingRequest,
    RowWindows,
    canvas_places,
    page_writes,
    window_bounds,
)
from sparsed_vllm.canvases import Canvases, NewCanvas
from sparsed_vllm.flash import flash_attention
from sparsed_vllm.graphs import LightGraph, LightGraphs
from sparsed_vllm.kernels.canvas import SequenceRows
from sparsed_vllm.logprobs import LogprobRecord
from sparsed_vllm.match import PromptMatch
from sparsed_vllm.metadata import SparsedMetadata
from sparsed_vllm.recorded_tables import RecordedTables
from sparsed_vllm.refresh import ContextMass, LightRows, ReadRows
from sparsed_vllm.rehearsal import rehearse, rehearse_canvases, rehearse_choices
from sparsed_vllm.sampler import DenoisingSampler
from sparsed_vllm.steps import Source

logger = init_logger("vllm.sparsed.model_state")


@dataclass(frozen=True)
class StepMetadata(ModelSpecificAttnMetadata):
    """Hands a step to our metadata builder; no other asks for it."""

    batch: DenoisingBatch | None
    windows: RowWindows | None

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        if not isinstance(attn_metadata_builder, SparsedMetadataBuilder):
            return {}
        return {"batch": self.batch, "windows": self.windows}


class DenoisingModelState(ModelState):
    """Keeps the running requests' plans and canvases, and feeds the canvases to the model.

    The canvases are the authority on a request's tokens; what vLLM's own buffers hold behind the
    prompt is overwritten before the model runs.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.reader = RequestReader(vllm_config)
        self.mask_token_id: int = self.model_config.hf_config.mask_token_id
        self.vocab_size = self.model_config.get_vocab_size()
        self.shift = int(self.reader.family.shifts_logits)
        self.requests: dict[str, DenoisingRequest] = {}
        longest = self.reader.limits.max_tokens or self.max_model_len
        self.canvases = Canvases(self.max_num_reqs, min(longest, self.max_model_len), device)
        self.mass: ContextMass | None = None  # where requests may reuse keys and values
        if self.reader.reuse_config is not None:
            sizes = (self.max_num_reqs, self.max_model_len)
            match = PromptMatch(self.canvases)
            self.mass = ContextMass(*sizes, device, tensor_model_parallel_all_reduce, match)
        self.graphs = LightGraphs(vllm_config, device)
        self.logprobs: dict[int, LogprobRecord] = {}  # by slot, of requests that ask
        self._opening: list[NewCanvas] = []
        # The latest step that was planned.
        self._input_batch: InputBatch | None = None
        self._batch: DenoisingBatch | None = None
        self._windows: RowWindows | None = None
        self._graph: LightGraph | None = None
        self._pages = torch.empty(0)  # int32 [num_reqs, most pages]
        self.req_states: RequestState | None = None

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Open the canvas of a request that is new, or resumes after preemption."""
        params, prompt_len = new_req_data.sampling_params, new_req_data.prompt_len
        canvas = (new_req_data.prefill_token_ids or [])[prompt_len:]
        if params is None or len(canvas) != params.max_tokens:
            return  # vLLM's warm-up sends prompts without a canvas.
        assert params.seed is not None, "the scheduler seeds every request"
        num_final = sum(token != self.mask_token_id for token in canvas)
        plan = self.reader.plan(params, prompt_len)
        request = DenoisingRequest(req_index, plan, num_final)
        self.requests[new_req_data.req_id] = request
        num_filled = num_final if request.cursor.step else 0
        self._opening.append(
            NewCanvas(req_index, len(canvas), params.seed, num_final, num_filled, canvas)
        )
        if params.logprobs is not None:
            self.logprobs[req_index] = LogprobRecord(len(canvas), params.logprobs, self.device)

    def remove_request(self, req_id: str) -> None:
        request = self.requests.pop(req_id, None)
        if request is not None:
            self.logprobs.pop(request.slot, None)

    def apply_staged_writes(self) -> None:
        self.canvases.add(self._opening)
        self._opening = []

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[Tensor, ...],
        kv_cache_config: KVCacheConfig,
        num_computed_tokens: Tensor,
    ) -> None:
        """Plan the step, and choose the rows whose logits it reads: open places only."""
        self._input_batch = input_batch
        self._batch, self._windows, self._graph = None, None, None
        requests = [self.requests.get(req_id) for req_id in input_batch.req_ids]
        known = [request for request in requests if request is not None]
        if len(known) < len(requests):
            return  # Warm-up, which counts on vLLM's own rows.
        self._pages = block_tables[0]
        batch = self._plan(input_batch, known)
        self._graph = self.graphs.find(batch)
        self._batch = self._with_reuse(batch)
        reads = batch.canvas.rows.batch_rows
        # A step that fills nothing still has a row: kernels for none at all are rarely tried.
        input_batch.logits_indices = reads if len(reads) else input_batch.logits_indices[:1]

    def _plan(self, input_batch: InputBatch, requests: list[DenoisingRequest]) -> DenoisingBatch:
        steps = [request.cursor.advance() for request in requests]
        granted = input_batch.num_scheduled_tokens[: len(requests)].tolist()
        assert granted == [step.num_rows for step in steps], "scheduler and worker are in step"
        # Rows of one policy side by side: they are worked on together.
        by_policy: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            by_policy.setdefault(request.policy, []).append(i)
        order = [i for members in by_policy.values() for i in members]
        slots = [request.slot for request in requests]
        params = [request.plan.params for request in requests]
        plans = [request.plan for request in requests]
        starts = input_batch.query_start_loc_np[: len(requests) + 1]
        firsts, ends = window_bounds(starts, steps, plans, self.shift)
        # Another backend's metadata knows no windows.
        if self.reader.sparse_config and (ends - firsts).sum() < input_batch.num_tokens:
            self._windows = RowWindows.of(starts, firsts, ends, self.device)
        places = canvas_places(starts, steps, plans, firsts, self.shift)
        canvas = self.canvases.open(slots, params, steps, order, places)
        return DenoisingBatch(input_batch.req_ids, requests, steps, starts, canvas)

    def _with_reuse(self, batch: DenoisingBatch) -> DenoisingBatch:
        """What a step does besides for requests that reuse keys and values."""
        kept = [i for i, plan in enumerate(batch.plans) if plan.reuse is not None]
        if self.mass is None or not kept:
            return batch
        slots = [request.slot for request in batch.requests]
        # Before the first step there are no states, and nothing to choose.
        tokens = None if self.req_states is None else self.req_states.all_token_ids.gpu
        light = self.mass.choose(batch.starts.tolist(), slots, batch.steps, batch.plans, tokens)
        # A captured step works them out for itself.
        writes = None if self._graph else page_writes(batch, kept, light, self._pages)
        spans = {
            i: (first, end - first)
            for i, first, end in batch.rows_of_requests()
            if batch.requests[i].cursor.chooses_next
        }
        self.mass.renew(slots, batch.steps, batch.plans)
        # A step that reads nothing keeps what the one before noted, but never another request's.
        begun = [i for i, step in enumerate(batch.steps) if step.source is Source.FRESH]
        self.mass.clear([slots[i] for i in sorted({*spans, *begun})])
        return replace(
            batch,
            light=light,
            writes=writes,
            reads=ReadRows(spans, batch.canvas.rows, slots) if spans else None,
            mass=self.mass.mass,
        )

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Write each canvas behind its prompt. Also called for vLLM's dummy batches.

        Returns what the model is called with besides.
        """
        self.req_states = req_states
        batch = self.batch_of(input_batch)
        if batch is None:
            return {}
        light = None if batch.light is None else self._of_light(batch.light, input_batch)
        self.canvases.write_ids(batch.canvas, input_batch.input_ids, self.mask_token_id, light)
        rows = self._windows.rows if self._windows else None
        return {"rows": rows, "graph": self._graph}

    def _of_light(self, light: LightRows, input_batch: InputBatch) -> SequenceRows:
        """The rows of light steps, and where their prompts are."""
        assert self.req_states is not None
        prompts, prompt_lens = self.req_states.all_token_ids.gpu, self.req_states.prompt_len.gpu
        rows = (light.rows, light.places, light.seqs)
        return SequenceRows(*rows, prompts, prompt_lens, input_batch.positions)

    def batch_of(self, input_batch: InputBatch) -> DenoisingBatch | None:
        """What was planned for `input_batch`; None for one that was not planned (dummy)."""
        return self._batch if self._input_batch is input_batch else None

    def recorded_tables(self, input_batch: InputBatch) -> RecordedTables | None:
        """How much the tables keep that the step has just recorded; None if it recorded none."""
        batch = self.batch_of(input_batch)
        if batch is None or not batch.recording:
            return None
        layers = [(layer.impl, layer.kv_cache) for layer in self._attention_layers()]
        return RecordedTables.of(batch, self._pages, layers)

    def _attention_layers(self) -> list[Any]:
        """The layers that attend with our backend; vLLM lists layers of experts beside them."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        return [layer for layer in layers if isinstance(getattr(layer, "impl", None), SparsedImpl)]

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {}

    def prepare_inputs_embeds(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],
        input_batch: InputBatch,
        req_states: RequestState,
    ) -> Tensor | None:
        return None

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Attention metadata by layer name: every sequence whole, both ways.

        A captured step has its own, which is filled.
        """
        batch = self.batch_of(input_batch)
        if batch is not None and self._graph is not None:
            self._graph.inputs.fill(batch, self._pages)
            return {}
        padded = cudagraph_mode == CUDAGraphMode.FULL
        num_reqs = input_batch.num_reqs_after_padding if padded else input_batch.num_reqs
        num_tokens = input_batch.num_tokens_after_padding if padded else input_batch.num_tokens
        seq_lens_bound = input_batch.seq_lens_cpu_upper_bound[:num_reqs]
        starts = torch.from_numpy(input_batch.query_start_loc_np[: num_reqs + 1])
        metadata = build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            query_start_loc_gpu=input_batch.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=starts,
            max_query_len=int(input_batch.num_scheduled_tokens.max()),
            seq_lens=input_batch.seq_lens,
            max_seq_len=self.max_model_len if for_capture else int(seq_lens_bound.max()),
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound,
            positions=input_batch.positions,
            is_prefilling=torch.from_numpy(input_batch.is_prefilling_np),
            for_cudagraph_capture=for_capture,
            causal=False,
            ubatch_idx=ubatch_idx,
            model_specific_attn_metadata=StepMetadata(batch, self._windows if batch else None),
        )
        return self._with_last_layer(metadata)

    def _with_last_layer(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """The same with what the last layer shall compute under its name."""
        last: str = self.model.last_attention_name
        whole = metadata.get(last)
        if isinstance(whole, SparsedMetadata) and whole.last_layer is not None:
            metadata[last] = whole.last_layer
        return metadata

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        """Compile and run what recording and sparse steps run, before a request does.

        Raises what a kernel raises: an engine whose kernels cannot run must not start.
        """
        self.graphs.forget()  # those of memory profiling
        if self.reader.sparse_config is not None:
            impl = self._attention_layers()[0].impl
            rehearse(impl, self.reader.sparse_config, dtype=self.dtype, device=self.device)
        rehearse_choices(self.mask_token_id, self.vocab_size, self.dtype, self.device)
        rehearse_canvases(self.canvases)

    def capture_inner_cudagraphs(
        self,
        input_buffers: InputBuffers,
        block_tables: BlockTables,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
    ) -> None:
        """Capture the light steps of few rows, where requests may take any."""
        if self.mass is None or not self._may_capture():
            return
        names = [layer.layer_name for layer in self._attention_layers()]
        pages = block_tables.input_block_tables[0]
        self.graphs.capture(self.model, input_buffers, names, pages, self.mass.mass)

    def _may_capture(self) -> bool:
        if flash_attention(self.device.type, self.dtype) is None:
            logger.info("Light steps run without CUDA graphs: FlashAttention is needed for them.")
            return False
        if self.vllm_config.parallel_config.data_parallel_size > 1:
            logger.info("Light steps run without CUDA graphs: data-parallel ranks run in step.")
            return False
        return True

    def custom_sampler(self, sampler: Any) -> tuple[DenoisingSampler, None]:
        return DenoisingSampler(self, sampler.compute_nans), None
