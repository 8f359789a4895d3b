# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Everything in vLLM that we build on still has the shape we expect.

What vLLM does with it is told by tests/engine, token by token.
"""

import dataclasses
import inspect
import pickle
from types import SimpleNamespace

import msgspec
import pytest
import torch
import vllm
from vllm import SamplingParams
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.transformers_utils import config as config_readers
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from sparsed_vllm.admission import SERVED_FIELDS
from sparsed_vllm.attention import (
    SparsedBackend,
    SparsedImpl,
    SparsedMetadataBuilder,
    load_backend,
)
from sparsed_vllm.compat import missing_seams, why_unsupported
from sparsed_vllm.model_state import DenoisingModelState
from sparsed_vllm.models.registry import MODELS, find_class
from sparsed_vllm.patches.apply import apply_all
from sparsed_vllm.patches.inventory import PATCHES, SERVER_PATCHES
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
    apply_all(SERVER_PATCHES)()  # and taken back


def test_logits_rows_can_be_replaced_before_the_forward():
    assert not InputBatch.__dataclass_params__.frozen
    fields = {field.name for field in dataclasses.fields(InputBatch)}
    assert fields >= {"logits_indices", "input_ids", "query_start_loc_np", "idx_mapping"}


def test_piecewise_graphs_call_the_model_with_what_the_model_state_prepared():
    prepared = {"rows": 1, "positions": 2}
    manager = SimpleNamespace(use_breakable_cg=False)
    assert CudaGraphManager.run_pw_graph(manager, dict, prepared) == prepared


def test_light_steps_are_captured_with_what_vllm_captures_with():
    assert names_of(capture_pool) == ["pool", "vllm_config"]
    buffers = InputBuffers(2, 8, torch.device("cpu"))
    assert (buffers.input_ids.dtype, buffers.positions.dtype) == (torch.int32, torch.int64)
    given = names_of(ModelState.capture_inner_cudagraphs)
    assert given == ["self", "input_buffers", "block_tables", "attn_groups", "kv_cache_config"]


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
    assert ModelRunnerOutput([], {}).sampling_masks is None


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


def test_logprobs_of_a_request_begin_where_we_say():
    lists = LogprobsTensors(*torch.zeros(2, 9, 2), torch.zeros(9), [0, 4, 4, 9]).tolists()
    assert len(lists.slice_request(2, 3).logprobs) == 3
    assert lists.cu_num_generated_tokens == [0, 4, 4, 9]


def test_every_sampling_parameter_we_serve_exists():
    assert {field.name for field in msgspec.structs.fields(SamplingParams)} >= SERVED_FIELDS


def test_our_architectures_are_registered_with_their_hook():
    from vllm.model_executor.models import ModelRegistry

    import sparsed_vllm

    sparsed_vllm.register()
    # By this table vLLM finds our classes where a config.json has no model_type.
    types = config_readers._ARCHITECTURE_TO_MODEL_TYPE
    for architecture, spec in MODELS.items():
        assert types[architecture] == find_class(spec.config).model_type
        assert architecture in ModelRegistry.get_supported_archs()
        assert MODELS_CONFIG_MAP[architecture].__name__ == "DenoisingModelConfig"
