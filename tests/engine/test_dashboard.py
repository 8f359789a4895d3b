# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The Grafana dashboard asks for metrics that an engine has, and shows all of ours."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from sparsed_vllm.metrics import COUNTERS, TABLE_BYTES

FILE = Path(__file__).parents[2] / "examples" / "grafana" / "sparsed.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@pytest.fixture(scope="module")
def dashboard():
    return json.loads(FILE.read_text())


def queries(dashboard):
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def metrics_in(expression):
    """{name of a metric: labels that the expression asks of it, by selector or by grouping}"""
    grouping = {
        label.strip()
        for labels in re.findall(r"by \(([^)]*)\)", expression)
        for label in labels.split(",")
    }
    selectors = re.findall(r"(vllm:\w+)\{([^}]*)\}", expression)
    return {name: {*grouping, *re.findall(r"(\w+)=", inner)} for name, inner in selectors}


def test_a_dashboard_grafana_can_load(dashboard):
    assert dashboard["title"] and dashboard["uid"] and dashboard["schemaVersion"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        letters = [target["refId"] for target in panel.get("targets", ())]
        assert panel["type"] == "row" or letters
        assert len(set(letters)) == len(letters)


def test_no_panel_covers_another(dashboard):
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        apart = [a[x] + a[w] <= b[x] or b[x] + b[w] <= a[x] for x, w in ("xw", "yh")]
        assert any(apart), (a, b)


def test_the_data_source_is_the_reader_s_choice(dashboard):
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["model_name"]["datasource"] == SOURCE
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            assert panel["datasource"] == target["datasource"] == SOURCE
    used = set(re.findall(r"\$(\w+)", " ".join(queries(dashboard))))
    assert used <= {*variables, "__rate_interval"}


@pytest.mark.engine
def test_every_metric_asked_for_is_there_with_its_labels(dashboard, llada):
    samples = {s.name: set(s.labels) for family in REGISTRY.collect() for s in family.samples}
    for expression in queries(dashboard):
        asked = metrics_in(expression)
        assert asked, expression
        for name, labels in asked.items():
            assert labels <= samples[name], expression


def test_all_of_our_metrics_are_shown(dashboard):
    shown = {name for expression in queries(dashboard) for name in metrics_in(expression)}
    assert shown >= {TABLE_BYTES.name, *(f"{counter.name}_total" for counter in COUNTERS)}
