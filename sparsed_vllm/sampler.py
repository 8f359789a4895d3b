# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""One denoising step for the batch: hidden states in, final tokens out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from sparsed_vllm.batch import DenoisingBatch, TokenPolicy
from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.canvas import SequenceEnds
from sparsed_vllm.kernels.choice import Choice, Forbidden
from sparsed_vllm.kernels.layout import send
from sparsed_vllm.logprobs import LogprobRecord, TokenScores, score_tokens
from sparsed_vllm.unmasking import draws_places

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from sparsed_vllm.canvases import CanvasStep
    from sparsed_vllm.model_state import DenoisingModelState

_LOGITS_AT_ONCE = 1 << 28  # numbers: 512 MiB in 16 bits
_SCORED_AT_ONCE = 1 << 25  # numbers of rows whose log probabilities are reported, in float32


class DenoisingSampler:
    """Stands in for vLLM's `Sampler`: the canvases live in the model state, this advances them.

    What vLLM hands over as logits are hidden states (MaskPredictor.compute_logits): the head runs
    here, over slices of the rows that are read, so that logits of all of them never exist at once.
    """

    def __init__(self, state: DenoisingModelState, compute_nans: bool) -> None:
        self.state = state
        self.compute_nans = compute_nans
        # Read by the runner after each step; no canvas has penalties.
        self.penalties_state = SimpleNamespace(output_bin_counts=None)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Nothing to do: the model state opens the canvas."""

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def __call__(self, hidden_states: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Advance every canvas of the batch by one step.

        hidden_states [rows, hidden_size]: the rows chosen by the model state, policy by policy
        Returns for each request the tokens that became final in this step, often none.
        """
        batch = self.state.batch_of(input_batch)
        if batch is None:
            self._hold_largest_step(hidden_states)
            return _nothing(input_batch)
        if len(batch.canvas.places):
            self._advance(hidden_states, batch)
        taken = self.state.canvases.take(batch.canvas, self._sequence_ends())
        slots = [request.slot for request in batch.requests]
        records = [self.state.logprobs.get(slot) for slot in slots]
        return SamplerOutput(
            sampled_token_ids=taken.tokens,
            logprobs_tensors=_join_scores(records, taken.places),
            num_nans=taken.has_failed,
            num_sampled=taken.counts,
            # All of the query, so that the next step computes the whole sequence again.
            num_rejected=input_batch.query_start_loc[: len(slots) + 1].diff(),
            # They travel as these; no engine of ours has such masks.
            sampling_mask_tensors=self.state.recorded_tables(input_batch),
        )

    def _advance(self, hidden_states: Tensor, batch: DenoisingBatch) -> None:
        """Choose a token for every place that is read, and fill the places that are due."""
        canvas = batch.canvas
        draws = any(draws_places(request.plan.params) for request in batch.requests)
        rows_by_policy = list(_slices(batch, self._rows_at_once))
        choices = [
            self._choose(hidden_states[rows], policy, canvas, rows)
            for policy, rows in rows_by_policy
        ]
        tokens, confidence, largest = (
            _joined([getattr(choice, name) for choice in choices])
            for name in ("tokens", "confidence", "largest")
        )
        uniform = api.draw_uniform(canvas.noise) if draws else None
        chosen = self.state.canvases.fill(canvas, tokens, confidence, largest, uniform)
        for (_, rows), choice in zip(rows_by_policy, choices, strict=True):
            if choice.scores is not None:
                self._record(batch, rows, choice.scores, chosen)

    def _choose(
        self,
        hidden_states: Tensor,
        policy: TokenPolicy,
        canvas: CanvasStep,
        rows: slice,
    ) -> Choices:
        """The tokens of some rows of one policy; hidden_states: theirs."""
        logits = self.state.model.score(hidden_states)
        forbidden = self._forbidden(policy, canvas, rows)
        drawn = canvas.noise.of(rows) if policy.choice.temperature > 0 else None
        tokens, confidence, largest = api.choose_tokens(logits, policy.choice, forbidden, drawn)
        scores = None
        if policy.logprobs is not None:
            scores = score_tokens(logits, tokens, policy.logprobs, self.state.mask_token_id)
        return Choices(tokens, confidence, largest, scores)

    def _forbidden(self, policy: TokenPolicy, canvas: CanvasStep, rows: slice) -> Forbidden:
        mask_token_id, stops = self.state.mask_token_id, policy.stop_tokens
        if not stops:
            return Forbidden(mask_token_id)
        early = canvas.is_early(rows)
        return Forbidden(mask_token_id, send(np.array(stops), early.device), early)

    def _record(
        self, batch: DenoisingBatch, rows: slice, scores: TokenScores, chosen: Tensor
    ) -> None:
        """Keep the scores of the places that were filled; scores: of `rows`."""
        canvas = batch.canvas
        for i, first, end in batch.rows_of_requests():
            part = slice(max(first, rows.start), min(end, rows.stop))
            record = self.state.logprobs.get(batch.requests[i].slot)
            if record is not None and part.start < part.stop:
                own = slice(part.start - rows.start, part.stop - rows.start)
                record.note(scores.of(own), canvas.places[part], chosen[part])

    def _rows_at_once(self, policy: TokenPolicy) -> int:
        """Rows of a policy whose logits exist together; bounds the memory."""
        numbers = _LOGITS_AT_ONCE if policy.logprobs is None else _SCORED_AT_ONCE
        return max(1, min(numbers // self.state.vocab_size, self.state.max_num_tokens))

    def _hold_largest_step(self, hidden_states: Tensor) -> None:
        """Take, for a moment, the memory of a step that reads as many rows as exist together.

        vLLM's dummy batches measure what a step needs; theirs has one row a request.
        """
        if hidden_states.device.type == "cpu":
            return
        plain = TokenPolicy(Choice(), (), None)
        for policy in (plain, plain._replace(logprobs=1)):
            rows = hidden_states.new_zeros(self._rows_at_once(policy), hidden_states.shape[1])
            logits, mask_token_id = self.state.model.score(rows), self.state.mask_token_id
            tokens, *_ = api.choose_tokens(logits, policy.choice, Forbidden(mask_token_id), None)
            if policy.logprobs is not None:
                score_tokens(logits, tokens, policy.logprobs, mask_token_id)
        if self.state.mass is not None:
            self.state.mass.hold()

    def _sequence_ends(self) -> SequenceEnds:
        """vLLM's record of each sequence's end, which shall be that of what was handed out.

        vLLM took the masks behind the prompt for prompt, and appends after them: past the row's
        end, into the next request's.
        """
        req_states = self.state.req_states
        assert req_states is not None, "inputs were prepared"
        return SequenceEnds(req_states.prompt_len.gpu, req_states.total_len.gpu)


class Choices(NamedTuple):
    """What was chosen for some rows; see api.choose_tokens. scores: None if nobody asked."""

    tokens: Tensor
    confidence: Tensor
    largest: Tensor
    scores: TokenScores | None


def _slices(
    batch: DenoisingBatch, most_of: Callable[[TokenPolicy], int]
) -> Iterator[tuple[TokenPolicy, slice]]:
    """The rows of the batch, policy by policy; most_of: as many of one at once."""
    by_policy = groupby(batch.rows_of_requests(), key=lambda part: batch.requests[part[0]].policy)
    for policy, parts in by_policy:
        bounds, most = [(first, end) for _, first, end in parts], most_of(policy)
        for start in range(bounds[0][0], bounds[-1][1], most):
            yield policy, slice(start, min(start + most, bounds[-1][1]))


def _joined(parts: list[Tensor]) -> Tensor:
    """One tensor of all parts; a copy only where there are several."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _nothing(input_batch: InputBatch) -> SamplerOutput:
    """What a batch without canvases hands out (warm-up)."""
    starts = input_batch.query_start_loc[: input_batch.num_reqs + 1]
    zeros = torch.zeros_like(starts[1:])
    return SamplerOutput(
        sampled_token_ids=zeros[:, None].long(),
        logprobs_tensors=None,
        num_nans=zeros,
        num_sampled=zeros,
        num_rejected=starts.diff(),
    )


def _join_scores(records: Sequence[LogprobRecord | None], places: Tensor) -> LogprobsTensors | None:
    """The scores of a batch in vLLM's form: rows of all requests, padded to one width.

    places int64 [num_reqs, width]: which of each request's. Those of request i begin at row
    cu_num_generated_tokens[i]; there may be more of them than tokens that count. None if nobody
    asks.
    """
    parts = [None if rec is None else rec.of(own) for rec, own in zip(records, places, strict=True)]
    given = [part for part in parts if part is not None]
    if not given:
        return None
    width = max(part.token_ids.shape[1] for part in given)

    def padded(columns: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(column, (0, width - column.shape[1])) for column in columns])

    lengths = [0 if part is None else len(part.ranks) for part in parts]
    return LogprobsTensors(
        padded([part.token_ids for part in given]),
        padded([part.logprobs for part in given]),
        torch.cat([part.ranks for part in given]),
        list(accumulate(lengths, initial=0)),
    )
