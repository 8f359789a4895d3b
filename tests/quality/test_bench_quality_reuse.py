# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The bench of reuse asks for what it says, and counts what requests cost."""

import json

import bench_quality_reuse
import pytest
from engines import start_engine
from needle.checkpoint import SHIPPED
from quality.methods import DENSE, METHODS, REUSE_METHODS

from sparsed_vllm.config import SparseConfig, Sparsity, choose_sparsity
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.reuse import ReuseConfig, choose_reuse
from sparsed_vllm.steps import Plan

COMMON = {"method", "canvas", "share", "every", "refresh", "sparse", "questions", "passes", "steps"}
GAINS = {"tokens_gain", "tokens_gain_margin", "exact_gain", "exact_gain_margin", "device"}


@pytest.mark.parametrize("method", REUSE_METHODS.values(), ids=lambda method: method.name)
def test_a_request_reuses_what_its_method_says(method):
    config = ReuseConfig(by_default=False)
    assert choose_reuse(config, method.request, num_steps=32) == method.reuse
    sparsity = choose_sparsity(SparseConfig(), method.request, length=1024)
    assert (sparsity is not None) == (method.table == "recorded")


def test_methods_of_the_plain_network_reuse_nothing():
    assert all(method.reuse is None for method in METHODS.values())


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the bench on a small engine and returns its lines."""
    monkeypatch.setattr(bench_quality_reuse, "start", start_small)

    def lines(arguments):
        bench_quality_reuse.main(arguments.split())
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return lines


def start_small(args):
    config = {"reuse": {"by_default": 0}}
    return start_engine(SHIPPED, max_model_len=640, additional_config=config)


@pytest.mark.engine
def test_a_run_prints_a_line_a_length_and_one_for_all(run):
    names = ["reuse-0.05-every-2", "reuse-0.02-sparse"]
    sizes = "--questions 2 --tasks single multikey --canvas 32 --steps 8 --lengths 96 400"
    lines = run(f"{sizes} --methods {' '.join(names)}")
    assert [(line["method"], line.get("length")) for line in lines] == [
        (name, length) for name in (DENSE.name, *names) for length in (96, 400, None)
    ]
    assert all(line.keys() >= COMMON | GAINS for line in lines)
    assert [line["questions"] for line in lines] == [4, 4, 8] * 3
    assert all(line["tokens_gain"] == line["tokens_gain_margin"] == 0 for line in lines[:3])
    for line in lines:
        lengths = [line["length"]] if "length" in line else [96, 400]
        expected = [planned_passes(REUSE_METHODS[line["method"]], n) for n in lengths]
        assert line["passes"] == pytest.approx(sum(expected) / len(expected), abs=1e-3)


def planned_passes(method, prompt_len):
    """Rows of the prompt that 8 steps compute, by its length."""
    params = DenoisingParams(32, 8, 32, "low_confidence")
    sparsity = Sparsity(0.2, 0.3, 32) if method.table == "recorded" else None
    plan = Plan(params, sparsity, prompt_len, reuse=method.reuse)
    rows = sum(plan.at(step).num_rows - 32 for step in range(8))
    return rows / prompt_len


@pytest.mark.parametrize(
    "arguments", ["--lengths 64", "--canvas 8", "--lengths 4500 --canvas 128", "--questions 1"]
)
def test_sizes_out_of_range_are_refused_with_one_line(arguments, capsys):
    with pytest.raises(SystemExit):
        bench_quality_reuse.parse(arguments.split())
    message = capsys.readouterr().err
    assert "--lengths must be at least 96" in message and message.count("\n") == 1
