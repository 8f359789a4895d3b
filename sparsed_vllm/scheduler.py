# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""vLLM's scheduler, taught that a request is its prompt and a canvas, computed whole each step."""

import random
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from sparsed_vllm.admission import RequestReader
from sparsed_vllm.phases import Schedule, resume_step

logger = init_logger("vllm.sparsed.scheduler")

NOT_NUMBERS = "logits that are not numbers"
"""Why a request ends with finish reason `error`."""


class DenoisingScheduler(Scheduler):
    """Deltas to vLLM's scheduler; admission, pages, preemption and fairness stay its own.

    A request's masks stand behind its prompt from the start, so that pages and token budget
    count the whole sequence and vLLM never splits it (chunked prefill is off). After each step
    the request is back at zero computed tokens. Steps are counted here, so that with async
    scheduling no step is sent beyond a request's last.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # No token is appended behind the canvas: its last place may be the model's last position.
        self.num_sampled_tokens_per_step = 0
        self.reader = RequestReader(self.vllm_config)
        self.mask_token_id: int = self.vllm_config.model_config.hf_config.mask_token_id
        self.steps_left: WeakKeyDictionary[Request, int] = WeakKeyDictionary()

    def add_request(self, request: Request) -> None:
        """Queue a request with its canvas; unseeded ones get a seed that all workers share."""
        assert request.sampling_params is not None, "pooling requests are refused at admission"
        if request.sampling_params.seed is None:
            # A copy: the parameters of n > 1 samples may be one object.
            params = request.sampling_params = copy(request.sampling_params)
            # Temperature 0 repeats itself, as vLLM's users expect, also where places are drawn.
            params.seed = random.getrandbits(63) if params.temperature > 0 else 0
        self._mask_rest(request)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        for request in self.running:
            if self.steps_left[request] <= 0:
                # All its steps are in flight. schedule() counts current_step up before it looks.
                request.next_decode_eligible_step = self.current_step + 2
        return super().schedule(throttle_prefills)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            self.steps_left[request] = self._remaining_steps(request)
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[req_id]
            request.num_computed_tokens = 0
            self.steps_left[request] -= 1

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """End the requests whose logits were no numbers; the others of the step go on."""
        num_nans = model_runner_output.num_nans_in_logits or {}
        bad = [req_id for req_id, count in num_nans.items() if count]
        failed = self.finish_requests(bad, RequestStatus.FINISHED_ERROR)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in failed:
            logger.error("Request %s failed: %s.", request.request_id, NOT_NUMBERS)
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.outputs.append(_failure_of(request))
        return outputs

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        # The base class appends to the sequence and compares its length with the limits.
        del request._all_token_ids[request.num_prompt_tokens + request.num_output_tokens :]
        new_token_ids, stopped = super()._update_request_with_output(
            request, new_token_ids, is_stale
        )
        request.num_computed_tokens = 0
        if not stopped:
            self._mask_rest(request)
        return new_token_ids, stopped

    def _mask_rest(self, request: Request) -> None:
        """Fill the sequence up to its full length with masks, in place: vLLM holds views of it."""
        missing = request.num_prompt_tokens + request.max_tokens - request.num_tokens
        request._all_token_ids.extend([self.mask_token_id] * missing)

    def _remaining_steps(self, request: Request) -> int:
        """The steps from where the request starts or, after a preemption, goes on."""
        assert request.sampling_params is not None
        params, sparsity = self.reader.read(request.sampling_params, request.num_prompt_tokens)
        schedule = Schedule.of(params)
        done = resume_step(schedule, request.num_output_tokens, sparsity is not None)
        return schedule.num_steps - done


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
