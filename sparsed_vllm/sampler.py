# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""One denoising step for the batch: logits in, final tokens out."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from sparsed_vllm.denoising import FinalTokens
from sparsed_vllm.kernels.choice import Forbidden
from sparsed_vllm.logprobs import TokenScores, rows_at_once, score_tokens
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.unmasking import choose_tokens

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from sparsed_vllm.model_state import DenoisingModelState, Turn


COMMON = [DenoisingParams(1, 1, 1, policy="low_confidence", temperature=t) for t in (0.0, 1.0)]
"""Decodings whose kernels are best compiled before requests come."""


class DenoisingSampler:
    """Stands in for vLLM's `Sampler`: the canvases live in the model state, this advances them."""

    def __init__(self, state: DenoisingModelState, compute_nans: bool) -> None:
        self.state = state
        self.compute_nans = compute_nans
        # Read by the runner after each step; no canvas has penalties.
        self.penalties_state = SimpleNamespace(output_bin_counts=None)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Nothing to do: the model state opens the canvas."""

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def __call__(self, logits: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Advance every canvas of the batch by one step.

        logits [rows, vocab]: the rows chosen by the model state, request by request
        Returns for each request the tokens that became final in this step, often none.
        """
        turns = self.state.turns_of(input_batch)
        if not turns:
            self._hold_largest_step(logits)
            turns = [None] * input_batch.num_reqs
        self._rewind_total_len(turns, input_batch)
        num_rows = [len(turn.places) if turn else 0 for turn in turns]
        parts = logits[: sum(num_rows)].split(num_rows)
        tables = self.state.recorded_tables(input_batch)
        taken = [self._advance(turn, rows) for turn, rows in zip(turns, parts, strict=True)]
        output = self._output(taken, input_batch)
        output.sampling_mask_tensors = tables  # which travel as these; ours has no such masks
        return output

    def _hold_largest_step(self, logits: Tensor) -> None:
        """Take, for a moment, the memory of a step in which every token of the batch is masked.

        vLLM's dummy batches measure what a step needs; theirs has one row of logits a request,
        and no tables.
        """
        if logits.device.type == "cpu":
            return
        self.state.rehearse()
        tables = self.state.largest_tables()
        largest = logits.new_zeros(self.state.max_num_tokens, logits.shape[-1])
        mask_token_id = self.state.mask_token_id
        for params in COMMON:
            tokens, *_ = choose_tokens(
                largest, params, Forbidden(mask_token_id), self.state.generator
            )
        some = slice(rows_at_once(logits.shape[-1]))  # logprobs widen so many logits
        score_tokens(largest[some].clone(), tokens[some], 1, mask_token_id)
        del tables

    def _advance(self, turn: Turn | None, rows: Tensor) -> FinalTokens:
        """The tokens of one request that became final in this step."""
        if turn is None:
            none = rows.new_empty(0, dtype=torch.int64)
            zero = rows.new_zeros((), dtype=torch.int64)
            return FinalTokens(none, zero, zero.bool())
        turn.denoising.advance(turn.places, rows)
        return turn.denoising.take_final()

    def _rewind_total_len(self, turns: list[Turn | None], input_batch: InputBatch) -> None:
        """Point vLLM's record of each sequence at the end of what was handed out.

        vLLM took the masks behind the prompt for prompt, and appends after them: past the row's
        end, into the next request's.
        """
        req_states = self.state.req_states
        if req_states is None or None in turns:
            return  # Warm-up, which hands out nothing.
        num_taken = torch.stack([turn.denoising.num_taken for turn in turns if turn])
        slots = input_batch.idx_mapping
        prompt_len = req_states.prompt_len.gpu[slots]
        req_states.total_len.gpu[slots] = prompt_len + num_taken.to(prompt_len.dtype)

    def _output(self, taken: list[FinalTokens], input_batch: InputBatch) -> SamplerOutput:
        """Pad the requests' tokens to one width, and tell the runner that nothing is cached."""
        starts = input_batch.query_start_loc[: len(taken) + 1]
        width = max(1, *(len(final.tokens) for final in taken))
        tokens = [F.pad(final.tokens, (0, width - len(final.tokens))) for final in taken]
        return SamplerOutput(
            sampled_token_ids=torch.stack(tokens),
            logprobs_tensors=_join_scores([final.scores for final in taken]),
            num_nans=torch.stack([final.has_failed for final in taken]).int(),
            num_sampled=torch.stack([final.count for final in taken]).int(),
            # All of the query, so that the next step computes the whole sequence again.
            num_rejected=starts.diff(),
        )


def _join_scores(scores: list[TokenScores | None]) -> LogprobsTensors | None:
    """The scores of a batch in vLLM's form: rows of all requests, padded to one width.

    Those of request i begin at row cu_num_generated_tokens[i]; there may be more of them than
    tokens that count. None if no request has any.
    """
    given = [part for part in scores if part is not None]
    if not given:
        return None
    width = max(part.token_ids.shape[1] for part in given)

    def padded(parts: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])

    lengths = [0 if part is None else len(part.ranks) for part in scores]
    return LogprobsTensors(
        padded([part.token_ids for part in given]),
        padded([part.logprobs for part in given]),
        torch.cat([part.ranks for part in given]),
        list(accumulate(lengths, initial=0)),
    )
