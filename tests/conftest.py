# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Settings for vLLM, made before it is imported, and the engines that tests share."""

import os

# One process, so that a test can look into the scheduler; test_serve.py spawns its own.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads gain nothing at these sizes, and where cores are shared they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from checkpoints import write_dream, write_llada


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped, with the reason, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def llada_path(tmp_path_factory):
    """A LLaDA checkpoint with grouped keys, in two shards."""
    return write_llada(tmp_path_factory.mktemp("llada"), n_kv_heads=2, shards=2)


@pytest.fixture(scope="session")
def dream_path(tmp_path_factory):
    return write_dream(tmp_path_factory.mktemp("dream"), n_kv_heads=2)


@pytest.fixture(scope="session")
def llada(llada_path):
    from engines import start_engine

    return start_engine(llada_path, disable_log_stats=False)


@pytest.fixture(scope="session")
def async_llada(llada_path):
    return start_async_engine(llada_path)


def start_async_engine(path, **kwargs):
    """An engine that schedules a step while another runs, which the CPU platform would forbid."""
    from engines import start_engine
    from vllm.platforms import current_platform

    platform = type(current_platform)
    settle = platform.check_and_update_config.__func__

    def settle_async(cls, config):
        settle(cls, config)
        config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "check_and_update_config", classmethod(settle_async))
        llm = start_engine(path, async_scheduling=True, **kwargs)
    assert llm.llm_engine.engine_core.engine_core.batch_queue_size == 2
    return llm


@pytest.fixture(scope="session")
def dream(dream_path):
    from engines import start_engine

    return start_engine(dream_path)


@pytest.fixture(scope="session")
def reusing_llada(llada_path):
    """An engine whose requests may reuse keys and values, and do not unless they ask."""
    from engines import MAY_REUSE, start_engine

    return start_engine(llada_path, additional_config=MAY_REUSE)


@pytest.fixture(scope="session")
def reusing_dream(dream_path):
    from engines import MAY_REUSE, start_engine

    return start_engine(dream_path, additional_config=MAY_REUSE)


@pytest.fixture(scope="session")
def async_reusing_llada(llada_path):
    from engines import MAY_REUSE

    return start_async_engine(llada_path, additional_config=MAY_REUSE)


@pytest.fixture(scope="session")
def needle():
    """The small trained model that ships with the repository."""
    from engines import start_engine
    from needle.checkpoint import SHIPPED

    return start_engine(SHIPPED, max_model_len=2048)


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)
