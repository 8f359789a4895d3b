# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Whose engines get the denoising's metrics."""

from types import SimpleNamespace

import pytest

from sparsed_vllm.metrics import COUNTERS, TABLE_BYTES, DenoisingMetrics
from sparsed_vllm.patches.denoising_metrics import PATCH


@pytest.fixture
def manager(monkeypatch):
    """A function that makes a stat logger manager for a model, with vLLM's own logger in it."""
    monkeypatch.setattr(DenoisingMetrics, "__init__", lambda self, config, indexes: None)

    def init(self, vllm_config):
        self.engine_indexes = [0, 1]
        self.stat_loggers = ["vLLM's"]

    def make(architecture):
        made = SimpleNamespace()
        model = SimpleNamespace(architecture=architecture)
        PATCH.wrap(init)(made, SimpleNamespace(model_config=model))
        return made

    return make


def test_our_models_have_metrics_that_are_asked_before_vllm_s(manager):
    ours, theirs = manager("LLaDAModelLM").stat_loggers
    assert isinstance(ours, DenoisingMetrics)
    assert theirs == "vLLM's"


def test_other_models_have_vllm_s_only(manager):
    assert manager("LlamaForCausalLM").stat_loggers == ["vLLM's"]


def test_no_two_numbers_have_one_key():
    keys = [key for metric in (*COUNTERS, TABLE_BYTES) for key in metric.keys]
    assert len(keys) == len(set(keys))
    for metric in COUNTERS:
        assert all(key.count("/") == len(metric.labels) for key in metric.keys)
