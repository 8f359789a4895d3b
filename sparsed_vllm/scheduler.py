# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""vLLM's scheduler, taught that a request is its prompt and a canvas, computed whole each step."""

import logging
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from itertools import islice
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from sparsed_vllm.admission import RequestReader
from sparsed_vllm.config import reason_for
from sparsed_vllm.metrics import report
from sparsed_vllm.tally import Progress, TableCount, Tally
from sparsed_vllm.turns import Claim, Room, Turns

logger = init_logger("vllm.sparsed.requests")

_MOST_WAITING = 512  # requests of the queue's front that are considered for a step

NOT_NUMBERS = "logits that are not numbers"
"""Why a request ends with finish reason `error`."""


class DenoisingScheduler(Scheduler):
    """Deltas to vLLM's scheduler; admission, pages and preemption stay its own.

    A request's masks stand behind its prompt from the start, so that pages count the whole sequence
    and vLLM never splits it (chunked prefill is off). Before a step a request has as many computed
    tokens as leave those that the step computes (its plan says which, steps.py); after it, none.
    Steps are counted here, so that with async scheduling no step is sent beyond a request's last.

    Requests may outgrow the token budget together: turns.py says who takes part in a step, and
    vLLM is shown only those.
    """

    waiting: RequestQueue

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # No token is appended behind the canvas: its last place may be the model's last position.
        self.num_sampled_tokens_per_step = 0
        self.reader = RequestReader(self.vllm_config)
        self.mask_token_id: int = self.vllm_config.model_config.hf_config.mask_token_id
        self.progress: dict[str, Progress] = {}  # by request id, as the claims
        self.claims: dict[str, Claim] = {}
        self.tally = Tally()
        self.turns = Turns()

    def add_request(self, request: Request) -> None:
        """Queue a request with its canvas; unseeded ones get a seed that all workers share."""
        assert request.sampling_params is not None, "pooling requests are refused at admission"
        if request.sampling_params.seed is None:
            # A copy: the parameters of n > 1 samples may be one object.
            params = request.sampling_params = copy(request.sampling_params)
            # Temperature 0 repeats itself, as vLLM's users expect, also where places are drawn.
            params.seed = random.getrandbits(63) if params.temperature > 0 else 0
        self._mask_rest(request)
        progress = self.progress[request.request_id] = self._read(request)
        self.tally.admit(progress)
        self.claims[request.request_id] = self._claim(request)
        super().add_request(request)

    def _read(self, request: Request) -> Progress:
        params, prompt_len = request.sampling_params, request.num_prompt_tokens
        assert params is not None
        reason = reason_for(self.reader.sparse_config, params.extra_args or {})
        return Progress.of(self.reader.plan(params, prompt_len), reason)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        granted = self._take_turns()
        chosen = [claim.request for claim in granted]
        taking_part = set(chosen)
        for request in self.running:
            if request not in taking_part:
                # schedule() counts current_step up before it looks.
                request.next_decode_eligible_step = self.current_step + 2
        for claim in granted:
            # vLLM grants what is not computed yet.
            claim.request.num_computed_tokens = claim.tokens - claim.rows
        waiting = [request for request in chosen if request.status is not RequestStatus.RUNNING]
        with self._showing(waiting):
            output = super().schedule(throttle_prefills)
        for request in chosen:
            request.num_computed_tokens = 0
        return output

    def _take_turns(self) -> list[Claim]:
        """The requests that take part in the coming step, in the order of admission.

        Requests with all their steps in flight do not.
        """
        running = [r.request_id for r in self.running]
        claims = [self._claim_of(i, True) for i in running if self.progress[i].steps_left > 0]
        if self.pause_state is PauseState.UNPAUSED:
            front = islice(self.waiting, _MOST_WAITING)
            claims += [self._claim_of(request.request_id, False) for request in front]
        return self.turns.take(claims, self._room())

    def _claim_of(self, request_id: str, is_running: bool) -> Claim:
        claim = self.claims[request_id]
        claim.is_running = is_running
        claim.rows = (
            self.progress[request_id].cursor.upcoming.num_rows if is_running else claim.tokens
        )
        return claim

    def _claim(self, request: Request) -> Claim:
        return Claim(
            request,
            request.num_tokens,
            request.arrival_time,
            priority=request.priority if self.policy is SchedulingPolicy.PRIORITY else 0,
            pages=-(-request.num_tokens // self.block_size),
            makes_way=self.progress[request.request_id].plan.reuse is not None,
        )

    def _room(self) -> Room:
        """What the coming step can hold.

        With nothing running, pages are vLLM's to judge: its reserve does not count then.
        """
        manager = self.kv_cache_manager
        free = manager.block_pool.get_num_free_blocks() - manager.watermark_blocks
        seats = min(self.max_num_running_reqs, self.max_num_active_reqs) - len(self.running)
        return Room(self.max_num_scheduled_tokens, seats, free if self.running else math.inf)

    @contextmanager
    def _showing(self, chosen: list[Request]) -> Iterator[None]:
        """Let vLLM see no other waiting requests than `chosen`, in that order."""
        everyone = self.waiting
        everyone.remove_requests(chosen)
        self.waiting = create_request_queue(SchedulingPolicy.FCFS)
        for request in chosen:
            self.waiting.add_request(request)
        try:
            yield
        finally:
            # Those that were not admitted after all, and those that were preempted.
            everyone.prepend_requests(reversed(list(self.waiting)))
            self.waiting = everyone

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            self.progress[new.req_id].start()
            self._grant_first_step(new.req_id, scheduler_output)
        for req_id in scheduler_output.num_scheduled_tokens:
            # Sent is run: what is aborted or preempted meanwhile costs its step all the same.
            self.tally.take_step(self.progress[req_id])

    def _grant_first_step(self, req_id: str, output: SchedulerOutput) -> None:
        """Take back what a request that starts or resumes does not compute in its first step.

        vLLM grants it the whole sequence; a canvas of variable length begins with one block.
        """
        granted = output.num_scheduled_tokens[req_id]
        rows = self.progress[req_id].cursor.upcoming.num_rows
        if rows == granted:
            return
        output.num_scheduled_tokens[req_id] = rows
        output.total_num_scheduled_tokens -= granted - rows
        self.requests[req_id].num_in_flight_tokens -= granted - rows

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        self._note_tables(model_runner_output)
        failed = self._end_failed(model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in failed:
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.outputs.append(_failure_of(request))
        for output in outputs.values():
            if output.scheduler_stats is not None:
                report(self.tally, self._table_bytes(), output.scheduler_stats)
        return outputs

    def _end_failed(self, model_runner_output: ModelRunnerOutput) -> list[Request]:
        """End the requests whose logits were no numbers; the others of the step go on."""
        num_nans = model_runner_output.num_nans_in_logits or {}
        bad = [req_id for req_id, count in num_nans.items() if count]
        failed = self.finish_requests(bad, RequestStatus.FINISHED_ERROR)
        for request in failed:
            logger.error("Request %s failed: %s.", request.request_id, NOT_NUMBERS)
        return failed

    def _note_tables(self, model_runner_output: ModelRunnerOutput) -> None:
        """Count the tables that a step recorded; see recorded_tables.py for their way here."""
        tables: dict[str, TableCount] = model_runner_output.sampling_masks or {}
        for req_id, table in tables.items():
            self.tally.record(table)
            if req_id in self.progress:
                self.progress[req_id].note_table(table)

    def _table_bytes(self) -> int:
        """What the tables of all running requests take on each rank."""
        tables = [self.progress[request.request_id].table for request in self.running]
        return sum(table.num_bytes for table in tables if table)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        progress = self.progress[request.request_id]
        self.tally.hand_out(progress, len(new_token_ids))
        # The base class appends to the sequence and compares its length with the limits.
        del request._all_token_ids[request.num_prompt_tokens + request.num_output_tokens :]
        new_token_ids, stopped = super()._update_request_with_output(
            request, new_token_ids, is_stale
        )
        request.num_computed_tokens = 0
        if not stopped:
            self._mask_rest(request)
        elif request.status == RequestStatus.FINISHED_STOPPED:
            self.tally.stop(progress)
        return new_token_ids, stopped

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("Request finished: %s", self._summary(request))
        del self.progress[request.request_id], self.claims[request.request_id]
        return super()._free_request(request, delay_free_blocks)

    def _summary(self, request: Request) -> str:
        facts = {
            "request": request.request_id,
            "finish": request.get_finished_reason(),
            "prompt_tokens": request.num_prompt_tokens,
            "tokens": request.num_output_tokens,
            "max_tokens": request.max_tokens,
            **self.progress[request.request_id].summary(),
            "preemptions": request.num_preemptions,
        }
        return " ".join(f"{name}={value}" for name, value in facts.items())

    def _mask_rest(self, request: Request) -> None:
        """Fill the sequence up to its full length with masks, in place: vLLM holds views of it."""
        missing = request.num_prompt_tokens + request.max_tokens - request.num_tokens
        request._all_token_ids.extend([self.mask_token_id] * missing)


def _failure_of(request: Request) -> EngineCoreOutput:
    """What the client of a request that failed is told."""
    return EngineCoreOutput(
        request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        stop_reason=NOT_NUMBERS,
        events=request.take_events(),
        trace_headers=request.trace_headers,
        num_nans_in_logits=1,
    )
