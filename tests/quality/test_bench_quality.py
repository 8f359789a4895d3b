# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The quality bench compares what it says it compares."""

import json

import bench_quality
import pytest
import torch
from needle import checkpoint
from needle.batches import EOS_ID
from needle.network import Network, Shape, full_attention
from needle.tasks import ALL_TASKS, TASKS
from quality.answers import Harness
from quality.attention import SparseAttention, window_lists
from quality.intervals import Mean, average, mean
from quality.methods import DENSE, METHODS, Method, method_of
from quality.questions import Question, draw, mark

SHAPE = Shape(n_layers=2, d_model=128, mlp_hidden_size=64)
BLOCK = 16


def attention(method, prompt=100, canvas=20, steps=10, batch=2, **sizes):
    return SparseAttention(
        method,
        batch=batch,
        prompt=prompt,
        canvas=canvas,
        steps=steps,
        block_size=BLOCK,
        device=torch.device("cpu"),
        **sizes,
    )


def heads(length=120, batch=2):
    """q, k, v [batch, heads, tokens, head size]"""
    return torch.randn(3, batch, 4, length, 32).unbind()


def lists(attend, layer=0):
    """The kept blocks of each query block and head."""
    return [
        [ids[:count].tolist() for ids, count in zip(row, counts, strict=True)]
        for row, counts in zip(*attend.lists(layer), strict=True)
    ]


def test_keeping_every_block_is_dense():
    q, k, v = heads()
    attend = attention(Method("all", "", select=1.0, skip=0.0))
    attend(1)(0, q, k, v)
    torch.testing.assert_close(attend(2)(0, q, k, v), full_attention(0, q, k, v))


def test_steps_are_dense_until_the_pattern_is_recorded():
    attend = attention(METHODS["sparsed-0.3"])  # int(10 * 0.2) + 1 = 3
    assert all(attend(step) is full_attention for step in range(3))
    out = attend(3)(0, *heads())
    assert out.shape == (2, 4, 120, 32) and attend.tables.keys() == {0}
    assert 0 < attend.density < 1


def test_a_shared_pattern_is_the_same_for_all_heads_and_others_are_not():
    q, k, v = heads()
    for name, same in (("shared", True), ("sparsed-0.3", False)):
        attend = attention(METHODS[name])
        attend(3)(0, q, k, v)
        assert all(row.count(row[0]) == len(row) for row in lists(attend)) == same


def test_by_mass_rows_of_one_table_differ_in_length():
    attend = attention(METHODS["mass-0.9"])
    attend(3)(0, *(3 * x for x in heads()))
    assert len({len(ids) for row in lists(attend) for ids in row}) > 1
    assert 0 < attend.density < 1
    assert METHODS["mass-0.9"].request.items() >= {"sparsed_mass": 0.9, "sparsed_select": 1}.items()


def test_without_isolation_each_row_keeps_the_same_number():
    attend = attention(METHODS["together"])
    attend(3)(0, *heads())
    assert {len(ids) for row in lists(attend) for ids in row} == {int(8 * 0.3) + 1}


def test_a_renewed_pattern_follows_the_step():
    attend = attention(METHODS["renewed"])
    attend(4)(0, *heads())
    before = lists(attend)
    attend(5)(0, *heads())
    assert lists(attend) != before


def test_a_pattern_is_recorded_again_as_often_as_the_method_says():
    attend = attention(Method("again", "", refresh=2))  # from step 3 of 10 on
    record, follow = attend.recording, attend.sparse
    assert [attend(step) for step in range(3, 8)] == [record, follow, record, follow, record]
    assert METHODS["refresh-8"].request["sparsed_refresh"] == 8


def test_windows_are_wide_as_told_and_hold_their_own_block():
    for width in range(1, 9):
        for sinks in (0, 1):
            rows = window_lists(8, width, sinks)
            assert all(len(set(row)) == len(row) == width and row == sorted(row) for row in rows)
            assert all(i in row for i, row in enumerate(rows) if width > sinks)
            assert all(row[0] == 0 for row in rows) or not sinks


def test_a_window_keeps_no_less_than_sparsed():
    sparsed, window = (attention(METHODS[name]) for name in ("sparsed-0.3", "window"))
    q, k, v = heads()
    sparsed(3)(0, q, k, v)
    window(0)(0, q, k, v)
    assert window.density >= sparsed.density


@torch.no_grad()
def test_answers_do_not_depend_on_the_batch():
    network = Network(SHAPE)
    questions = [draw("multikey", 100, 24, index) for index in range(3)]
    harness = Harness(network, canvas=24, steps=6, block_size=BLOCK)
    for name in ("dense", "sparsed-0.3", "streaming"):
        together, _ = harness.answer(METHODS[name], questions)
        alone = [harness.answer(METHODS[name], [question])[0][0] for question in questions]
        assert together == alone


@torch.no_grad()
def test_dense_steps_that_methods_share_are_computed_once():
    network, calls = Network(SHAPE), []
    network.register_forward_hook(lambda *_: calls.append(1))
    questions = [draw("single", 100, 24, index) for index in range(2)]
    harness = Harness(network, canvas=24, steps=6, block_size=BLOCK)
    for name, count in (("dense", 6), ("sparsed-0.3", 4)):  # dense steps 0 and 1
        alone = Harness(network, canvas=24, steps=6, block_size=BLOCK)
        expected = alone.answer(METHODS[name], questions)
        calls.clear()
        assert harness.answer(METHODS[name], questions) == expected
        assert len(calls) == count
    other = [draw("single", 100, 24, index) for index in range(2, 4)]
    assert harness.answer(DENSE, other) != harness.answer(DENSE, questions)


def test_a_method_may_have_a_block_size_of_its_own():
    harness = Harness(Network(SHAPE), canvas=24, steps=6, block_size=BLOCK)
    questions = [draw("single", 300, 24, 0)]
    _, small = harness.answer(METHODS["sparsed-0.3"], questions)
    _, large = harness.answer(METHODS["blocks-128"], questions)
    assert small < large  # of three blocks more must be kept than of twenty
    assert METHODS["blocks-128"].request["sparsed_block_size"] == 128
    assert "sparsed_block_size" not in METHODS["sparsed-0.3"].request


def test_questions_repeat_and_have_the_length_asked_for():
    for task in ("multiquery", "common"):
        question = draw(task, 200, 32, 7)
        assert question == draw(task, 200, 32, 7) != draw(task, 200, 32, 8)
        assert len(question.prompt) == 200 and len(question.answer) < 32


def test_marks_count_tokens_by_place_and_stop_at_the_end_of_the_text():
    question = Question("single", [1], [5, 6, 7, 8])
    assert mark(question, [5, 6, 7, 8, EOS_ID, 9]).exact
    assert mark(question, [5, 6, 0, 8, EOS_ID]).tokens == 0.75
    assert not mark(question, [5, 6, 7, 8, 9, EOS_ID]).exact


def test_intervals_are_those_of_the_normal_distribution():
    assert mean([0.0, 1.0] * 50).value == 0.5
    assert mean([0.0, 1.0] * 50).margin == pytest.approx(1.96 * 0.0502519, rel=1e-4)
    assert average([Mean(0.2, 0.03), Mean(0.4, 0.04)]) == Mean(pytest.approx(0.3), 0.025)


@pytest.mark.parametrize(
    "arguments, field",
    [
        ("--lengths 4577", "--lengths must be 96 to 4576, got 4577"),
        ("--samples 0", "--samples must be at least 2, got 0"),
        ("--tasks poetry", "--tasks must be of single"),
        ("--methods magic", "--methods must be of dense"),
        ("--dtype int8", "--dtype must be of float32, bfloat16, got int8"),
        ("--block-size 48", "--block-size must be of 16, 32, 64, 128, got 48"),
        ("--steps 33", "--steps must be 1 to 32, got 33"),
        ("--canvas 129", "--canvas must be 16 to 128, got 129"),
        ("--tasks single listing", "--tasks listing needs a --canvas of 128, got 32"),
        ("--methods sparsed-0", "--methods must be of dense"),
        ("--methods sparsed-0.1-blocks-48", "sizes 16, 32, 64, 128, got sparsed-0.1-blocks-48"),
        ("--methods sparsed-0.1-blocks-64-rows-32", "rows a multiple of the size, sizes 16"),
        ("--model nowhere", "--model is a folder with a config.json, got nowhere"),
    ],
)
def test_nonsense_is_refused_with_one_line(arguments, field, capsys):
    with pytest.raises(SystemExit):
        bench_quality.parse(arguments.split())
    message = capsys.readouterr().err
    assert field in message and message.count("\n") == 1


def test_a_run_leaves_lines_and_prints_tables(tmp_path, capsys):
    out = tmp_path / "quality.jsonl"
    arguments = "--lengths 96 --samples 2 --tasks single --steps 4 --block-size 16 --device cpu"
    bench_quality.main([*arguments.split(), "--methods", "window", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["method"], line["task"]) for line in lines] == [
        (method, task) for method in (DENSE.name, "window") for task in ("single", "average")
    ]
    assert all(0 <= line["tokens"] <= 100 and line["samples"] == 2 for line in lines)
    assert "| sliding window |" in capsys.readouterr().out


def test_any_share_and_block_size_is_a_method_by_its_name():
    assert all(method_of(name) is method for name, method in METHODS.items())
    method = method_of("sparsed-0.05-blocks-64")
    assert (method.select, method.block_size, method.skip) == (0.05, 64, 0.2)
    assert method.request["sparsed_select"] == 0.05
    assert method_of("sparsed-0.05").block_size is None
    finer = method_of("sparsed-0.1-blocks-32-rows-128")
    assert (finer.select, finer.block_size, finer.query_block_size) == (0.1, 32, 128)
    sizes = {"sparsed_block_size": 32, "sparsed_query_block_size": 128}
    assert finer.request.items() >= sizes.items()
    early = method_of("sparsed-0.1-blocks-32-rows-128-skip-0.1")
    assert early.request == {**finer.request, "sparsed_skip": 0.1}
    assert method_of("sparsed-0.5-skip-0").skip == 0


def test_query_blocks_may_have_more_rows_than_key_blocks():
    q, k, v = heads()
    method = Method("finer", "", skip=0.0)
    square = attention(method)
    finer = attention(method, query_block_size=64)
    for attend in (square, finer):
        attend(1)(0, q, k, v)
        assert attend(2)(0, q, k, v).shape == q.shape
    assert len(lists(finer)) == 2 * 2 < len(lists(square)) == 2 * 8
    assert max(ids[-1] for row in lists(finer) for ids in row) == 7


def test_a_long_canvas_asks_long_answers_too():
    def tasks(canvas):
        return bench_quality.parse(["--canvas", str(canvas)]).tasks

    assert tasks(32) == tasks(64) == list(TASKS) and tasks(128) == list(ALL_TASKS)


@pytest.fixture
def long_model(tmp_path):
    """A tiny network that takes texts of 33k tokens."""
    sizes = {"n_layers": 1, "n_heads": 1, "d_model": 64, "mlp_hidden_size": 64}
    checkpoint.save(Network(Shape(**sizes, max_sequence_length=33280)), tmp_path / "model")
    return tmp_path / "model"


def test_lengths_reach_as_far_as_the_model(long_model, capsys):
    long = ["--model", str(long_model), "--canvas", "128", "--lengths"]
    assert bench_quality.parse([*long, "8192", "16384", "32768"]).lengths[-1] == 32768
    with pytest.raises(SystemExit):
        bench_quality.parse([*long, "33153"])
    assert "--lengths must be 96 to 33152, got 33153" in capsys.readouterr().err


def test_a_run_goes_on_with_the_marks_of_one_before(long_model, tmp_path, monkeypatch):
    asked, answer = [], Harness.answer

    def noting(harness, method, questions):
        asked.append((method.name, len(questions)))
        return answer(harness, method, questions)

    monkeypatch.setattr(Harness, "answer", noting)
    monkeypatch.setitem(bench_quality.BATCH_TOKENS, "cpu", 300)  # two texts at once
    sizes = "--lengths 96 --tasks single common --steps 4 --device cpu"
    files = f"--model {long_model} --marks {tmp_path / 'marks'} --out {tmp_path / 'lines'}"

    def lines(more):
        asked.clear()
        bench_quality.main([*f"{sizes} {files} {more}".split()])
        made = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
        (tmp_path / "lines").unlink()
        return [{k: v for k, v in line.items() if k != "seconds"} for line in made]

    whole = lines("--samples 6 --methods sparsed-0.3")
    # Part by part: the dense steps of a part are computed once.
    assert asked == [("dense", 2), ("sparsed-0.3", 2)] * 6
    (tmp_path / "marks").unlink()
    lines("--samples 4 --methods dense")
    assert lines("--samples 6 --methods sparsed-0.3") == whole
    assert asked == [*[("sparsed-0.3", 2)] * 4, *[("dense", 2), ("sparsed-0.3", 2)] * 2]
    assert lines("--samples 6 --methods sparsed-0.3") == whole and not asked
    lines("--samples 2 --seed 1 --methods dense")
    assert asked
    # Other weights answer otherwise, under the same name.
    checkpoint.save(Network(checkpoint.shape_of(long_model)), long_model)
    lines("--samples 2 --methods dense")
    assert asked
