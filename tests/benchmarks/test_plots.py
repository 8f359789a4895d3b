# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What the plots take from the kept lines."""

import json
from pathlib import Path

import plot_attention
import plot_generate
import plot_reuse

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def lines_of(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def test_latencies_stand_beside_the_papers():
    curves = plot_generate.curves_of(lines_of("generate.jsonl"), "llada", 128)
    assert curves["paper, A800: dense"][65536] == 2127
    ours = curves["ours, H100: sparse"]
    assert ours[65536] < curves["ours, H100: dense"][65536]


def test_other_steps_and_models_are_not_mixed_in():
    lines = lines_of("generate.jsonl")
    long = plot_generate.curves_of(lines, "llada", 1024)
    assert long.keys() == {"ours, H100: dense", "ours, H100: sparse"}
    assert plot_generate.curves_of([{**lines[3], "batch": 4}], "llada", 1024) == {}


def test_generations_with_reuse_stand_beside_exact_ones_and_others():
    kept = lines_of("generate_reuse.jsonl")
    dual = next(line for line in kept if (line["engine"], line["mode"]) == ("fast-dllm", "dual"))
    theirs = {**dual, "seconds": 60.0}
    small = {**theirs, "config": {"n_layers": 2}, "tokens": 2}
    curves = plot_reuse.curves_of([*kept, theirs, small], "llada", 128, 128)
    assert curves["ours: reuse, share 0.02"][65536] < curves["ours: exact"][65536]
    theirs_by_tokens = curves["Fast-dLLM: dual cache"]
    assert theirs_by_tokens[theirs["tokens"]] == 60.0 and 2 not in theirs_by_tokens
    assert next(iter(curves)) == "ours: exact"


def test_curves_of_attention_are_of_one_density_and_kind_of_lists():
    curves = plot_attention.curves_of(lines_of("attention.jsonl"), 0.3, "random")
    assert {4096, 16384, 65536} <= curves["llada"]["ours_gluon"].keys()
    assert "select_blocks" not in curves["llada"]  # no product, no rate
    assert plot_attention.curves_of(lines_of("attention.jsonl"), 0.7, "random") == {}
