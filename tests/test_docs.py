# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The pages in docs/ that can go stale do not."""

import re
from dataclasses import fields
from pathlib import Path

import list_parameters
import pytest

from sparsed_vllm.config import REQUEST_FIELDS
from sparsed_vllm.families import FAMILIES
from sparsed_vllm.limits import Limits
from sparsed_vllm.metrics import COUNTERS, TABLE_BYTES
from sparsed_vllm.params import request_fields

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_the_page_of_parameters_is_what_the_code_parses():
    written = (ROOT / "docs/parameters.md").read_text()
    assert written == list_parameters.page(), "run tools/list_parameters.py > docs/parameters.md"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_request_parameter_and_policy_is_on_the_page_of_requests(family):
    page = (ROOT / "docs/requests.md").read_text()
    for name in (*request_fields(family, 32), *REQUEST_FIELDS, *family.policies):
        assert f"`{name}`" in page, name


def test_every_limit_is_on_the_page_of_requests():
    page = (ROOT / "docs/requests.md").read_text()
    for field in fields(Limits):
        assert f"| `{field.name}` |" in page, field.name


def test_every_metric_is_on_the_page_of_metrics():
    page = (ROOT / "docs/metrics.md").read_text()
    for metric in (*COUNTERS, TABLE_BYTES):
        assert f"`{metric.name}" in page, metric.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_metrics_that_a_page_names_exist(page):
    text = page.read_text()
    for path in re.findall(r"[\w.]+/[\w/]+\.(?:py|md|png|jsonl)", text):
        assert (ROOT / path).is_file(), path
    names = {metric.name for metric in (*COUNTERS, TABLE_BYTES)}
    names |= {f"{metric.name}_total" for metric in COUNTERS}
    assert set(re.findall(r"vllm:sparsed_\w+", text)) <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_readme_leads_to_every_page(page):
    assert f"docs/{page.name}" in (ROOT / "README.md").read_text()
