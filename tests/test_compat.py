# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Which versions of vLLM are accepted, and what happens on others."""

import logging

import pytest

import sparsed_vllm
from sparsed_vllm import plugin
from sparsed_vllm.compat import why_unsupported


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.dev3+cpu", "0.33.0", "0.33.1rc1"])
def test_supported_versions_have_nothing_against_them(version):
    assert why_unsupported(version) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0", "0.9.1", "dev", ""])
def test_other_versions_are_named_with_the_range(version):
    assert "vllm>=0.32,<0.34" in why_unsupported(version)


def test_an_unsupported_vllm_gets_one_error_and_nothing_registered(monkeypatch, caplog):
    applied = []
    monkeypatch.setattr(plugin.vllm, "__version__", "0.40.0")
    monkeypatch.setattr("sparsed_vllm.patches.apply.apply_all", applied.append)
    monkeypatch.setattr(plugin.logger, "propagate", True)
    plugin.install_once.cache_clear()
    with caplog.at_level(logging.ERROR, logger="vllm.sparsed"):
        sparsed_vllm.register()
        sparsed_vllm.register()
    plugin.install_once.cache_clear()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "0.40.0" in caplog.text
    assert not applied
