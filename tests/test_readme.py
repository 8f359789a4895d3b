# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What the README says of the code is what the code does."""

from dataclasses import fields
from pathlib import Path

import pytest

from sparsed_vllm.config import REQUEST_FIELDS
from sparsed_vllm.families import FAMILIES
from sparsed_vllm.limits import Limits
from sparsed_vllm.metrics import COUNTERS, TABLE_BYTES
from sparsed_vllm.params import request_fields
from sparsed_vllm.patches.inventory import as_table

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_request_parameter_and_policy_is_in_the_readme(family):
    for name in (*request_fields(family, 32), *REQUEST_FIELDS, *family.policies):
        assert f"`{name}`" in README, name


def test_every_metric_is_in_the_readme():
    for metric in (*COUNTERS, TABLE_BYTES):
        assert f"`{metric.name}" in README, metric.name


def test_every_limit_is_in_the_readme():
    for field in fields(Limits):
        assert f"| `{field.name}` |" in README, field.name


def test_the_patches_in_force_are_in_the_readme():
    assert as_table() in README
