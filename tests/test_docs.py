# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The pages in docs/ that can go stale do not."""

import re
from pathlib import Path

import list_parameters
import pytest

from sparsed_vllm.metrics import COUNTERS

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_the_page_of_parameters_is_what_the_code_parses():
    written = (ROOT / "docs/parameters.md").read_text()
    assert written == list_parameters.page(), "run tools/list_parameters.py > docs/parameters.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_metrics_that_a_page_names_exist(page):
    text = page.read_text()
    for path in re.findall(r"[\w.]+/[\w/]+\.(?:py|md|png|jsonl)", text):
        assert (ROOT / path).is_file(), path
    names = {metric.name for metric in COUNTERS}
    assert set(re.findall(r"vllm:sparsed_\w+", text)) <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_readme_leads_to_every_page(page):
    assert f"docs/{page.name}" in (ROOT / "README.md").read_text()
