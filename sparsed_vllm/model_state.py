# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The worker's side of denoising: each step's token ids, attention metadata and logits rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata, ModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from sparsed_vllm.admission import RequestReader
from sparsed_vllm.attention import SparsedMetadataBuilder
from sparsed_vllm.config import Sparsity
from sparsed_vllm.denoising import Denoising
from sparsed_vllm.pattern import Pattern, num_bytes_at_most
from sparsed_vllm.phases import Phase
from sparsed_vllm.recorded_tables import RecordedTables
from sparsed_vllm.rehearsal import rehearse
from sparsed_vllm.sampler import DenoisingSampler
from sparsed_vllm.windows import Windows, window_around


@dataclass(frozen=True)
class Turn:
    """One request's part of a step.

    places int64 [n]: the places of its canvas whose logits are read, -1 for padding
    query_start: where its sequence begins in the batch;  prompt_len: tokens before the canvas
    window: tokens of its sequence: whole blocks that hold all whose hidden states are read
    pattern: the table that the step writes or follows; None: it does neither
    """

    denoising: Denoising
    places: Tensor
    query_start: int
    prompt_len: int
    window: slice
    pattern: Pattern | None


@dataclass(frozen=True)
class StepPlan:
    """What a step does with each request of `batch`, in batch order; None: no canvas (warm-up).

    windows: the rows that the last layer computes; None: all
    """

    batch: InputBatch
    turns: list[Turn | None]
    windows: Windows | None = None


class StepPatterns(ModelSpecificAttnMetadata):
    """Hands a step's phases, tables and windows to our metadata builder; no other asks for them."""

    def __init__(self, plan: StepPlan) -> None:
        self.windows = plan.windows
        # The phase is read before the sampler advances the request.
        self.patterns = [
            (turn.denoising.phase, turn.pattern) if turn else (Phase.DENSE, None)
            for turn in plan.turns
        ]

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        if not isinstance(attn_metadata_builder, SparsedMetadataBuilder):
            return {}
        return {"patterns": self.patterns, "windows": self.windows}


class DenoisingModelState(ModelState):
    """Keeps one `Denoising` per running request and feeds its canvas to the model each step.

    The canvas here is the authority on a request's tokens; what vLLM's own buffers hold behind
    the prompt is overwritten before the model runs.
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
        self.family = self.reader.family
        self.mask_token_id = self.model_config.hf_config.mask_token_id
        self.requests: dict[str, Denoising] = {}
        self.patterns: dict[str, Pattern] = {}
        self.generator = torch.Generator(device)
        self.plan: StepPlan | None = None
        parallel_config = vllm_config.parallel_config
        self._num_layers = self.model_config.get_num_layers(parallel_config)
        self._num_heads = self.model_config.get_num_attention_heads(parallel_config)  # this rank's
        self.req_states: RequestState | None = None

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Open the canvas of a request that is new, or resumes after preemption."""
        params = new_req_data.sampling_params
        canvas = (new_req_data.prefill_token_ids or [])[new_req_data.prompt_len :]
        if params is None or len(canvas) != params.max_tokens:
            return  # vLLM's warm-up sends prompts without a canvas.
        assert params.seed is not None, "the scheduler seeds every request"
        self.requests[new_req_data.req_id] = Denoising(
            *self.reader.read(params, new_req_data.prompt_len),
            canvas,
            num_final=sum(token != self.mask_token_id for token in canvas),
            mask_token_id=self.mask_token_id,
            seed=params.seed,
            generator=self.generator,
        )

    def remove_request(self, req_id: str) -> None:
        self.requests.pop(req_id, None)
        self.patterns.pop(req_id, None)

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[Tensor, ...],
        kv_cache_config: KVCacheConfig,
        num_computed_tokens: Tensor,
    ) -> None:
        """Choose the rows whose logits the step reads: open places only."""
        starts = input_batch.query_start_loc_np
        turns = [
            self._turn(req_id, int(starts[i]), int(starts[i + 1]))
            for i, req_id in enumerate(input_batch.req_ids)
        ]
        self.plan = StepPlan(input_batch, turns, self._windows(turns, input_batch))
        if None in turns:
            return  # Warm-up, which counts on vLLM's own rows.
        rows = torch.cat([self._rows(turn) for turn in turns if turn])
        # A step that fills nothing still has a row: kernels for none at all are rarely tried.
        input_batch.logits_indices = rows if len(rows) else input_batch.logits_indices[:1]

    def _turn(self, req_id: str, start: int, end: int) -> Turn | None:
        denoising = self.requests.get(req_id)
        if denoising is None:
            return None
        prompt_len = end - start - denoising.params.num_tokens
        if denoising.phase is Phase.RECORDING:
            self.patterns[req_id] = self._new_pattern(denoising.sparsity, prompt_len, end - start)
        pattern = self.patterns.get(req_id)
        window = self._window(denoising, prompt_len, end - start)
        return Turn(denoising, denoising.open_places(), start, prompt_len, window, pattern)

    def _window(self, denoising: Denoising, prompt_len: int, length: int) -> slice:
        if denoising.phase is Phase.RECORDING:
            return slice(0, length)  # A table has a row for every query block.
        first = prompt_len - self.family.shifts_logits
        reach = denoising.reach()
        return window_around(range(first + reach.start, first + reach.stop), length)

    def _windows(self, turns: list[Turn | None], input_batch: InputBatch) -> Windows | None:
        """The windows of a step, where they leave something out."""
        if self.reader.sparse_config is None:
            return None  # Another backend's metadata knows no windows.
        windows = [turn.window for turn in turns if turn]
        num_rows = sum(window.stop - window.start for window in windows)
        if len(windows) < len(turns) or num_rows == input_batch.num_tokens:
            return None
        return Windows.at(windows, input_batch.query_start_loc_np.tolist(), self.device)

    def _new_pattern(self, sparsity: Sparsity | None, prompt_len: int, length: int) -> Pattern:
        assert sparsity is not None
        return Pattern(
            sparsity,
            num_prompt_tokens=prompt_len,
            num_tokens=length,
            num_layers=self._num_layers,
            num_heads=self._num_heads,
            device=self.device,
        )

    def largest_tables(self) -> Tensor:
        """As much memory as the tables of all running requests can take together.

        The scheduler admits no more tokens of sparse requests than a step has.
        """
        config = self.reader.sparse_config
        sizes = (self.max_num_tokens, self.max_model_len)
        each = num_bytes_at_most(*sizes, config.table_ids) if config else 0
        shape = (self._num_layers, self._num_heads, each)
        return torch.empty(shape, dtype=torch.uint8, device=self.device)

    def rehearse(self) -> None:
        """Compile what recording and sparse steps run, with attention as the model has it."""
        config = self.reader.sparse_config
        if config is not None:
            layers = self.vllm_config.compilation_config.static_forward_context.values()
            impl = next(iter(layers)).impl
            sizes = {"longest": self.max_model_len, "dtype": self.dtype, "device": self.device}
            rehearse(impl, config, **sizes)

    def _rows(self, turn: Turn) -> Tensor:
        """Rows of the hidden states that predict `turn.places`; padding reads one in its window."""
        first = turn.prompt_len - self.family.shifts_logits
        return turn.query_start + (first + turn.places).clamp(min=turn.window.start)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Write each canvas behind its prompt. Also called for vLLM's dummy batches.

        Returns what the model is called with besides.
        """
        self.req_states = req_states
        for turn in self.turns_of(input_batch):
            if turn is not None:
                canvas = turn.denoising.canvas.tokens
                start = turn.query_start + turn.prompt_len
                input_batch.input_ids[start : start + len(canvas)] = canvas
        windows = self._plan_of(input_batch).windows
        return {"rows": windows.rows} if windows else {}

    def turns_of(self, input_batch: InputBatch) -> list[Turn | None]:
        """The turns planned for `input_batch`; none for a batch that was not planned (dummy)."""
        return self._plan_of(input_batch).turns

    def _plan_of(self, input_batch: InputBatch) -> StepPlan:
        if self.plan is None or self.plan.batch is not input_batch:
            return StepPlan(input_batch, [])
        return self.plan

    def recorded_tables(self, input_batch: InputBatch) -> RecordedTables | None:
        """The tables that the step has just recorded. Call it before the canvases advance."""
        tables = {
            req_id: turn.pattern
            for req_id, turn in zip(input_batch.req_ids, self.turns_of(input_batch), strict=False)
            if turn and turn.pattern and turn.denoising.phase is Phase.RECORDING
        }
        return RecordedTables(tables) if tables else None

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
        """Attention metadata by layer name: every sequence whole, both ways."""
        padded = cudagraph_mode == CUDAGraphMode.FULL
        num_reqs = input_batch.num_reqs_after_padding if padded else input_batch.num_reqs
        num_tokens = input_batch.num_tokens_after_padding if padded else input_batch.num_tokens
        seq_lens_bound = input_batch.seq_lens_cpu_upper_bound[:num_reqs]
        starts = torch.from_numpy(input_batch.query_start_loc_np[: num_reqs + 1])
        return build_attn_metadata(
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
            model_specific_attn_metadata=StepPatterns(self._plan_of(input_batch)),
        )

    def custom_sampler(self, sampler: Any) -> tuple[DenoisingSampler, None]:
        return DenoisingSampler(self, sampler.compute_nans), None
