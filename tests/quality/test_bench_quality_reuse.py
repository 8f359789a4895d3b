# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The bench of reuse asks for what it says, and counts what requests cost."""

import json

import bench_quality_reuse
import pytest
from engines import start_engine
from needle.checkpoint import SHIPPED
from quality import experiments
from quality.methods import DENSE, METHODS
from quality.reuse_methods import REUSE_METHODS, method_of
from vllm import SamplingParams

from sparsed_vllm.config import SparseConfig, Sparsity, choose_sparsity
from sparsed_vllm.kernels import api
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.reuse import Reuse, ReuseConfig, choose_reuse
from sparsed_vllm.steps import Cursor, Plan

COMMON = {"method", "canvas", "share", "every", "refresh", "sparse", "questions", "passes", "steps"}
ENGINE_METHODS = [m for m in map(method_of, REUSE_METHODS) if m.cache is None]
GAINS = {"tokens_gain", "tokens_gain_margin", "exact_gain", "exact_gain_margin", "device"}


@pytest.mark.parametrize("method", ENGINE_METHODS, ids=lambda method: method.name)
def test_a_request_reuses_what_its_method_says(method):
    config = ReuseConfig(by_default=False)
    assert choose_reuse(config, method.request, num_steps=32) == method.reuse
    sparsity = choose_sparsity(SparseConfig(), method.request, length=1024)
    assert (sparsity is not None) == (method.table == "recorded")
    if sparsity is not None:
        assert (sparsity.mass, sparsity.refresh) == (method.mass, method.refresh)


def test_methods_of_the_plain_network_reuse_nothing():
    assert all(method.reuse is None for method in METHODS.values())


def test_a_name_says_all_settings():
    method = method_of("reuse-0.02-every-2-refresh-8-blocks-16-by-both-sparse-layers-last2-rows-2")
    assert method.reuse == Reuse(0.02, 2, 8, "both")
    assert method.request["block_length"] == method.block_length == 16
    assert method.table == "recorded" and method.experiment == (("layers", "last2"), ("rows", "2"))
    tables = method_of("reuse-0.02-mass-0.95-record-8")
    assert (tables.table, tables.select, tables.mass, tables.refresh) == ("recorded", 1.0, 0.95, 8)
    assert method_of("mass-0.95").mass == 0.95 and method_of("mass-0.95").reuse is None
    assert (method_of("dual-8").cache, method_of("dual-8").block_length) == ("dual", 8)


@pytest.mark.parametrize(
    "name",
    [
        "reuse",
        "reuse-x",
        "reuse-0.1-by-luck",
        "reuse-0.1-every",
        "reuse-0.1-heads-0",
        "reuse-0.1-layers-most",
        "window",
        "dual-0",
    ],
)
def test_a_name_that_means_nothing_is_refused(name, capsys):
    with pytest.raises(SystemExit):
        bench_quality_reuse.parse(["--methods", name])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_block_that_does_not_divide_the_canvas_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_quality_reuse.parse(["--canvas", "32", "--methods", "dual-24"])
    assert "dual-24 must divide the canvas" in capsys.readouterr().err


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the bench on a small engine and returns its lines."""
    monkeypatch.setattr(bench_quality_reuse, "start", start_small)

    def lines(arguments):
        bench_quality_reuse.main(arguments.split())
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return lines


def start_small(args):
    config = {"reuse": {"by_default": 0, "layers": 1}}
    return start_engine(SHIPPED, max_model_len=640, additional_config=config)


@pytest.mark.engine
def test_a_run_prints_a_line_a_length_and_one_for_all(run, tmp_path):
    names = ["reuse-0.05-every-2", "reuse-0.02-sparse", "reuse-0-refresh-2-blocks-8", "cached-8"]
    sizes = "--questions 2 --tasks single multikey --canvas 32 --steps 8 --lengths 96 400"
    command = f"{sizes} --methods {' '.join(names)} --marks {tmp_path / 'marks.jsonl'}"
    lines = run(command)
    assert [(line["method"], line.get("length")) for line in lines] == [
        (name, length) for name in (DENSE.name, *names) for length in (96, 400, None)
    ]
    assert all(line.keys() >= COMMON | GAINS for line in lines)
    assert [line["questions"] for line in lines] == [4, 4, 8] * 5
    assert all(line["tokens_gain"] == line["tokens_gain_margin"] == 0 for line in lines[:3])
    for line in lines:
        lengths = [line["length"]] if "length" in line else [96, 400]
        expected = [planned_passes(method_of(line["method"]), n) for n in lengths]
        assert line["passes"] == pytest.approx(sum(expected) / len(expected), abs=1e-3)
    marks = (tmp_path / "marks.jsonl").read_text()
    asked = list(map(json.loads, marks.splitlines()))
    # A block's first step whole, the others from the block on: Fast-dLLM's prefix cache.
    assert [x["marks"] for x in asked[6:8]] == [x["marks"] for x in asked[8:10]]
    assert run(command) == lines
    assert (tmp_path / "marks.jsonl").read_text() == marks


def planned_passes(method, prompt_len):
    """Prompts that 8 steps compute, by the prompt's length."""
    if method.cache is not None:
        return 4
    params = DenoisingParams(32, 8, method.block_length or 32, "low_confidence")
    sparsity = Sparsity(0.2, 0.3, 32) if method.table == "recorded" else None
    plan = Plan(params, sparsity, prompt_len, reuse=method.reuse)
    steps = [plan.at(step) for step in range(8)]
    return sum(s.num_chosen + max(0, prompt_len - s.first_row) for s in steps) / prompt_len


@pytest.mark.engine
def test_an_experiment_ends_with_its_method(reusing_llada):
    notes = [layer.notes_mass for layer in experiments.layers_of(reusing_llada)]
    before = api.token_mass, Cursor.chooses_next
    settings = [("layers", "first1"), ("heads", "1"), ("rows", "2"), ("noted", "4")]
    with experiments.applied(reusing_llada, settings):
        inside = [layer.notes_mass for layer in experiments.layers_of(reusing_llada)]
        assert inside == [True] + [False] * (len(notes) - 1)
        assert api.token_mass is not before[0]
    assert [layer.notes_mass for layer in experiments.layers_of(reusing_llada)] == notes
    assert (api.token_mass, Cursor.chooses_next) == before


def steps_of(settings, **reuse):
    """[(phase, whether all tokens are computed)] of 8 sparse steps."""
    params = DenoisingParams(32, 8, 32, "low_confidence")
    plan = Plan(params, Sparsity(0.2, 0.3, 32), 100, reuse=Reuse(0.1, **reuse))
    with experiments.applied(None, settings):
        return [(step.phase.value, step.num_rows == 132) for step in map(plan.at, range(8))]


def test_tables_are_recorded_after_the_warm_up_where_an_experiment_says():
    whole, light = ("sparse", True), ("sparse", False)
    assert steps_of([], refresh=5) == [("recording", True), *[light] * 4, whole, light, light]
    warm = steps_of([("recorded", "warm")])
    assert warm == [("dense", True), ("dense", False), ("recording", True), *[light] * 5]


def answers(llm, experiment, **extra):
    """The tokens of two sparse requests under an experiment's settings."""
    prompts = [{"prompt_token_ids": [i % 50 for i in range(n)]} for n in (90, 200)]
    extra = {"steps": 16, "use_sparsed": 1, "sparsed_block_size": 16, **extra}
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, extra_args=extra)
    with experiments.applied(llm, experiment):
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.engine
@pytest.mark.parametrize("select", [0.05, 0.3])
def test_recorded_after_the_warm_up_with_own_lists_for_all_tokens_it_is_sparsed(
    reusing_llada, select
):
    experiment = [("recorded", "warm"), ("lists", "own")]
    everything = answers(reusing_llada, experiment, sparsed_select=select, kv_share=0.9999)
    assert everything == answers(reusing_llada, [], sparsed_select=select)


@pytest.mark.engine
def test_chosen_tokens_follow_lists_where_an_experiment_says(reusing_llada):
    whole = {"kv_share": 0.3, "sparsed_select": 1.0}
    few = {**whole, "sparsed_select": 0.05}
    own, canvas = [("lists", "own")], [("lists", "canvas")]
    dense = answers(reusing_llada, [], **whole)
    assert answers(reusing_llada, own, **whole) == answers(reusing_llada, canvas, **whole) == dense
    got = [answers(reusing_llada, experiment, **few) for experiment in (own, canvas, [])]
    assert got[0] != got[2] and got[1] != got[2]


def test_a_long_answer_on_a_short_canvas_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_quality_reuse.parse(["--canvas", "32", "128", "--tasks", "single", "paragraph"])
    assert "--tasks paragraph needs a --canvas of 128, got 32" in capsys.readouterr().err
    args = bench_quality_reuse.parse(["--canvas", "128", "--tasks", "paragraph"])
    assert args.tasks == ["paragraph"]


@pytest.mark.parametrize(
    "arguments", ["--lengths 64", "--canvas 8", "--lengths 4500 --canvas 128", "--questions 1"]
)
def test_sizes_out_of_range_are_refused_with_one_line(arguments, capsys):
    with pytest.raises(SystemExit):
        bench_quality_reuse.parse(arguments.split())
    message = capsys.readouterr().err
    assert "--lengths must be at least 96" in message and message.count("\n") == 1
