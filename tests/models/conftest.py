# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A configuration that is refused is refused at once."""

import pytest


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    """vLLM reads a config.json that it cannot read a second time, two seconds later."""
    monkeypatch.setattr("vllm.transformers_utils.config.with_retry", lambda read, *_, **__: read())
