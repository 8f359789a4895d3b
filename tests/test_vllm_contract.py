# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Everything in vLLM that we build on still has the shape we expect."""

import dataclasses
import inspect
import pickle

import msgspec
import pytest
import torch
import vllm
from vllm import SamplingParams
from vllm.entrypoints.generate.beam_search import offline, online
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.states import RequestState

from sparsed_vllm.admission import SERVED_FIELDS
from sparsed_vllm.attention import (
    SparsedBackend,
    SparsedImpl,
    SparsedMetadataBuilder,
    load_backend,
)
from sparsed_vllm.compat import missing_seams, why_unsupported
from sparsed_vllm.model_state import DenoisingModelState
from sparsed_vllm.models import ARCHITECTURES
from sparsed_vllm.models.network import MaskPredictor
from sparsed_vllm.patches.apply import apply_all
from sparsed_vllm.patches.inventory import PATCHES
from sparsed_vllm.sampler import DenoisingSampler
from sparsed_vllm.scheduler import DenoisingScheduler


def names_of(function):
    return list(inspect.signature(function).parameters)


def overridden(ours, theirs):
    """Methods that `ours` defines and `theirs` has too."""
    return [
        name
        for name, member in vars(ours).items()
        if inspect.isfunction(member) and hasattr(theirs, name) and name != "__init__"
    ]


def test_this_vllm_is_supported_and_has_every_seam():
    assert why_unsupported(vllm.__version__) is None
    assert missing_seams() == []


@pytest.mark.parametrize(
    ("ours", "theirs"), [(DenoisingScheduler, Scheduler), (DenoisingModelState, ModelState)]
)
def test_our_overrides_take_what_vllm_passes(ours, theirs):
    assert overridden(ours, theirs)
    for name in overridden(ours, theirs):
        assert names_of(getattr(ours, name)) == names_of(getattr(theirs, name)), name


def test_patches_fit_their_targets():
    apply_all(PATCHES)


def test_the_runner_asks_our_sampler_only_for_what_it_has():
    source = inspect.getsource(model_runner.GPUModelRunner)
    used = {"add_request", "apply_staged_writes", "penalties_state", "compute_nans"}
    for name in used:
        assert f"self.sampler.{name}" in source, name
        assert (
            name in vars(DenoisingSampler)
            or name in names_of(DenoisingSampler.__init__)
            or (name == "penalties_state")
        )


def test_logits_rows_can_be_replaced_before_the_forward():
    assert not InputBatch.__dataclass_params__.frozen
    fields = {field.name for field in dataclasses.fields(InputBatch)}
    assert fields >= {"logits_indices", "input_ids", "query_start_loc_np", "idx_mapping"}
    execute = inspect.getsource(model_runner.GPUModelRunner.execute_model)
    assert execute.index("preprocess_state(") < execute.index("model_state.prepare_inputs(")
    sample = inspect.getsource(model_runner.GPUModelRunner.sample)
    assert "hidden_states[input_batch.logits_indices]" in sample


def test_the_model_is_called_with_what_the_model_state_prepared():
    execute = inspect.getsource(model_runner.GPUModelRunner.execute_model)
    assert "**self.model_state.prepare_inputs(input_batch, self.req_states)" in execute
    assert "self.model(**model_inputs)" in execute
    piecewise = inspect.getsource(CudaGraphManager.run_pw_graph)
    assert "return model(**model_inputs)" in piecewise
    assert "rows" in names_of(MaskPredictor.forward)


def test_a_sampler_may_say_how_many_tokens_count():
    fields = [field.name for field in dataclasses.fields(SamplerOutput)]
    assert fields[:5] == [
        "sampled_token_ids",
        "logprobs_tensors",
        "num_nans",
        "num_sampled",
        "num_rejected",
    ]


def test_counts_of_tables_travel_to_the_scheduler_as_sampling_masks_do():
    assert [field.name for field in dataclasses.fields(SamplerOutput)][5] == "sampling_mask_tensors"
    copied = inspect.getsource(AsyncOutput.__init__)
    assert "sampler_output.sampling_mask_tensors.to_cpu_nonblocking()" in copied
    assert "self.sampling_mask_tensors.tolists(" in inspect.getsource(AsyncOutput.get_output)
    assert ModelRunnerOutput([], {}).sampling_masks is None
    update = inspect.getsource(Scheduler.update_from_output)
    assert update.index("if self.return_sampling_mask:") < update.index(".sampling_masks")


def test_the_scheduler_s_statistics_have_room_for_ours():
    assert SchedulerStats().kv_connector_stats is None
    sent = SchedulerStats(kv_connector_stats={"ours": {"count": 1}})
    wire = msgspec.msgpack.encode(sent)
    assert msgspec.msgpack.decode(wire, type=SchedulerStats) == sent


def test_attention_metadata_can_be_bidirectional():
    assert inspect.signature(build_attn_metadata).parameters["causal"].default is True


def test_the_attention_backend_is_called_as_we_expect():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert names_of(SparsedImpl.forward) == names_of(CPUAttentionBackend.get_impl_cls().forward)
    theirs = names_of(CPUAttentionBackend.get_builder_cls().build)
    assert names_of(SparsedMetadataBuilder.build)[: len(theirs)] == theirs
    builds = inspect.getsource(build_attn_metadata)
    assert "get_extra_attn_kwargs" in builds
    assert not inspect.isabstract(SparsedImpl)


def test_our_backend_survives_pickling():
    member = load_backend()
    assert pickle.loads(pickle.dumps(member)) is member
    assert pickle.loads(pickle.dumps(AttentionBackendEnum.FLASH_ATTN)).name == "FLASH_ATTN"
    assert member.get_class() is SparsedBackend


def test_requests_have_the_fields_that_the_scheduler_sets():
    request = Request("1", [1, 2], SamplingParams(max_tokens=4), None)
    views = request.all_token_ids
    request._all_token_ids.extend([9, 9])
    assert list(views) == [1, 2, 9, 9]
    assert request.num_tokens == 4
    assert request.num_output_tokens == 0
    assert request.next_decode_eligible_step == 0
    assert "num_sampled_tokens_per_step" in inspect.getsource(Scheduler.schedule)


def test_the_scheduler_looks_at_requests_where_we_hide_and_show_them():
    schedule = inspect.getsource(Scheduler.schedule)
    assert "self.current_step < request.next_decode_eligible_step" in schedule
    assert "request_queue = self.waiting" in schedule
    source = inspect.getsource(Scheduler)
    for name in ("policy", "waiting", "max_num_running_reqs", "max_num_scheduled_tokens"):
        assert f"self.{name}" in source, name
    pages = inspect.getsource(KVCacheManager)
    assert "self.block_pool.get_num_free_blocks()" in pages
    assert "self.watermark_blocks" in pages


def test_what_is_no_number_reaches_the_scheduler_with_the_tokens():
    outputs = inspect.getsource(AsyncOutput)
    assert "self.num_nans = async_copy_to_np(sampler_output.num_nans)" in outputs
    assert "self.model_runner_output.num_nans_in_logits = dict(" in outputs


def test_logprobs_of_a_request_begin_where_we_say():
    lists = LogprobsTensors(*torch.zeros(2, 9, 2), torch.zeros(9), [0, 4, 4, 9]).tolists()
    assert len(lists.slice_request(2, 3).logprobs) == 3
    assert lists.cu_num_generated_tokens == [0, 4, 4, 9]


@pytest.mark.parametrize("module", [online, offline], ids=lambda module: module.__name__)
def test_beam_search_asks_for_what_we_know_it_by(module):
    source = inspect.getsource(module)
    for part in ("max_tokens=1,", "watermarking=False,", "detokenize=False,", "logprobs="):
        assert part in source


def test_only_a_default_length_is_no_limit():
    for serving in (OpenAIServingChat, OpenAIServingCompletion):
        source = inspect.getsource(serving.__init__)
        assert 'mc.generation_config not in ("auto", "vllm")' in source
        assert 'override_generation_config", {}).get("max_new_tokens")' in source


def test_the_worker_keeps_each_sequence_s_length_where_we_set_it():
    assert "total_len" in inspect.getsource(RequestState.__init__)
    assert "self.req_states.total_len.gpu" in inspect.getsource(
        model_runner.GPUModelRunner.postprocess_sampled
    )


def test_every_sampling_parameter_we_serve_exists():
    assert {field.name for field in msgspec.structs.fields(SamplingParams)} >= SERVED_FIELDS


def test_our_architectures_are_registered_with_their_hook():
    from vllm.model_executor.models import ModelRegistry

    import sparsed_vllm

    sparsed_vllm.register()
    for architecture in ARCHITECTURES:
        assert architecture in ModelRegistry.get_supported_archs()
        assert MODELS_CONFIG_MAP[architecture].__name__ == "DenoisingModelConfig"
