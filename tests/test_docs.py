# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The pages in docs/ that can go stale do not."""

import re
from dataclasses import fields
from pathlib import Path

import draw_reuse
import list_parameters
import pytest

from sparsed_vllm import reuse
from sparsed_vllm.config import REQUEST_FIELDS
from sparsed_vllm.families import FAMILIES
from sparsed_vllm.limits import Limits
from sparsed_vllm.metrics import COUNTERS, TABLE_BYTES
from sparsed_vllm.models.registry import FOREIGN, MODELS, find_class
from sparsed_vllm.params import request_fields
from sparsed_vllm.patches.inventory import PATCHES, SERVER_PATCHES, as_table

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WRITTEN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_the_page_of_parameters_is_what_the_code_parses():
    written = (ROOT / "docs/parameters.md").read_text()
    assert written == list_parameters.page(), "run tools/list_parameters.py > docs/parameters.md"


def test_the_picture_of_reuse_shows_the_steps_of_a_plan():
    drawn = (ROOT / "docs/reuse.svg").read_text()
    assert drawn == draw_reuse.picture(), "run tools/draw_reuse.py > docs/reuse.svg"


def test_every_setting_of_reuse_is_on_its_page():
    page = (ROOT / "docs/reuse.md").read_text()
    for name in (*reuse.SECTION_FIELDS, *reuse.REQUEST_FIELDS):
        assert f"`{name}`" in page, name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_request_parameter_and_policy_is_on_the_page_of_requests(family):
    page = (ROOT / "docs/requests.md").read_text()
    own = (*REQUEST_FIELDS, *reuse.REQUEST_FIELDS)
    for name in (*request_fields(family, 32), *own, *family.policies):
        assert f"`{name}`" in page, name


def test_every_model_and_every_refused_key_is_on_the_page_of_models():
    page = (ROOT / "docs/models.md").read_text()
    for name in (*MODELS, *FOREIGN):
        assert f"`{name}`" in page, name
    for spec in MODELS.values():
        for key in find_class(spec.config).computed:
            assert f"`{key}`" in page, key


def test_every_limit_is_on_the_page_of_requests():
    page = (ROOT / "docs/requests.md").read_text()
    for field in fields(Limits):
        assert f"| `{field.name}` |" in page, field.name


def test_every_metric_is_on_the_page_of_metrics():
    page = (ROOT / "docs/metrics.md").read_text()
    for metric in (*COUNTERS, TABLE_BYTES):
        assert f"`{metric.name}" in page, metric.name


def test_the_page_of_patches_has_the_tables_that_the_inventory_prints():
    page = (ROOT / "docs/patches.md").read_text()
    assert as_table(PATCHES) in page
    assert as_table(SERVER_PATCHES) in page


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_files_and_metrics_that_a_page_names_exist(page):
    text = re.sub("```diff.*?```", "", LINK.sub("]", page.read_text()), flags=re.DOTALL)
    for path in re.findall(r"(?<![\w./-])(?:\w+/)+[\w.]+\.(?:py|md|png|jsonl|json|sh)\b", text):
        assert (ROOT / path).is_file() or (ROOT / "sparsed_vllm" / path).is_file(), path
    names = {metric.name for metric in (*COUNTERS, TABLE_BYTES)}
    names |= {f"{metric.name}_total" for metric in COUNTERS}
    assert set(re.findall(r"vllm:sparsed_\w+", text)) <= names


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_links_lead_to_a_file_and_to_a_heading_in_it(page):
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def anchors_of(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_readme_leads_to_every_page(page):
    assert f"docs/{page.name}" in LINK.findall((ROOT / "README.md").read_text())


def test_the_readme_is_read_in_a_few_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
