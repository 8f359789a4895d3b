# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A default length where vLLM would give all that is left, and nothing else changed."""

from types import SimpleNamespace

import pytest

from sparsed_vllm.patches.default_length import PATCH


def defaults_of(generation_config, **hf_config):
    model = SimpleNamespace(
        hf_config=SimpleNamespace(**hf_config), generation_config=generation_config
    )
    return PATCH.wrap(lambda model: {"temperature": 0.5})(model)


@pytest.mark.parametrize("source", ["auto", "vllm"])
def test_our_models_have_a_default_length(source):
    expected = {"temperature": 0.5, "max_tokens": 40}
    assert defaults_of(source, default_max_tokens=40) == expected


def test_other_models_and_an_operator_s_own_file_keep_vllm_s(tmp_path):
    assert defaults_of("auto") == {"temperature": 0.5}
    assert defaults_of(str(tmp_path), default_max_tokens=40) == {"temperature": 0.5}
