# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The needle model's continuation to long texts: its plan, how it goes on, and its exam."""

import sys
from dataclasses import replace

import pytest
import torch
import train_needle
from needle import checkpoint, evaluation, record, training
from needle.batches import EOS_ID
from needle.network import Network, Shape
from needle.plan import (
    LENGTHS,
    LONG_LENGTHS,
    LONG_TOKENS,
    ROOM,
    Plan,
    Standing,
    batch_size,
    continued,
)
from needle.record import Record
from needle.tasks import LONG_CANVAS
from torch import nn

TINY = Shape(n_layers=1, n_heads=1, d_model=64, mlp_hidden_size=64)
LONG = continued(20, 33024, trained=4352, batch_tokens=8192)


def test_a_continuation_begins_with_quick_steps_and_ends_with_the_longest_texts():
    assert LONG.lengths == LENGTHS + LONG_LENGTHS
    stages = [LONG.latest_stage(share / 100) for share in range(101)]
    assert stages == sorted(stages) and LONG.lengths[stages[0]] == 1024
    assert stages[8] == stages[0] and stages[40] == len(LONG.lengths) - 1
    assert set(stages) == set(range(stages[0], len(LONG.lengths)))


def test_a_network_has_room_for_the_texts_that_it_was_trained_on():
    assert Shape().max_sequence_length == LENGTHS[-1] + ROOM
    assert LONG_LENGTHS[-1] >= 32768 + LONG_CANVAS


def test_a_model_of_long_texts_goes_on_with_them():
    again = continued(5, 33024, trained=33024, batch_tokens=8192)
    assert again.lengths[again.first] == 33024 and again.latest_stage(0) == again.first
    shorter = continued(5, 12288, trained=33024, batch_tokens=8192)
    assert shorter.lengths[shorter.first] == 12288


def test_the_short_plan_is_as_it_was():
    plan = Plan(8.5)
    assert [plan.latest_stage(p) for p in (0, 0.3, 0.6, 1)] == [0, 5, 11, 11]
    assert [batch_size(n, 8192) for n in LENGTHS] == [max(8192 // n, 8) for n in LENGTHS]


def test_weights_are_rounded_to_the_nearest_with_few_bits():
    weight = torch.tensor([0.0, 1.0, -1.0, 1.03, 1.04, -1.97, 3e-3, 60000.0])
    kept = checkpoint.rounded(weight, 4)
    assert kept[:6].tolist() == [0, 1, -1, 1, 1.0625, -2]
    assert (kept.float() - weight).abs().le(weight.abs() / 32).all()
    assert torch.equal(checkpoint.rounded(weight, 7), weight.bfloat16())
    assert torch.equal(checkpoint.rounded(kept, 4), kept)


def test_batches_of_long_texts_fit_and_hold_two_texts_or_more():
    sizes = [batch_size(length, 8192) for length in LONG_LENGTHS]
    assert sizes == [8, 8, 6, 4, 3, 2]
    assert all(n * size <= LONG_TOKENS for n, size in zip(LONG_LENGTHS, sizes, strict=True))


def test_rates_of_a_continuation_are_lower_and_warm_up_anew_when_it_goes_on():
    assert LONG.adam_rate < Plan(1).adam_rate and LONG.muon_rate < Plan(1).muon_rate
    assert LONG.rate(0, 0.3, begun=0.3) == pytest.approx(1 / LONG.warm_up)
    assert LONG.rate(LONG.warm_up, 0.31, begun=0.3) == 1
    assert LONG.rate(10**6, 1, begun=0.3) == 0


def test_a_record_is_read_as_it_was_written(tmp_path):
    written = Record(LONG, 7, Standing(61.5, 12))
    record.save(written, tmp_path)
    assert record.load(tmp_path) == written
    record.remove(tmp_path)
    assert record.load(tmp_path) is None


def command(monkeypatch, *arguments):
    words = [str(word) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["train_needle.py", *words])
    train_needle.run(train_needle.parse())


@pytest.fixture
def tiny(tmp_path):
    checkpoint.save(Network(TINY), tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_continuation_that_was_stopped_goes_on_at_its_stage(tiny, tmp_path, monkeypatch, capsys):
    out, few = tmp_path / "long", ["--workers", 1, "--lengths"]
    how = ["--longest", 6144, "--rope-theta", 40000, "--minutes", 1, "--stop-after", 0.01]
    command(monkeypatch, "--continue", tiny, "--out", out, *how, *few)
    said = capsys.readouterr().out
    assert "texts of 1024 to 6144 tokens" in said and f"--continue {out} goes on" in said
    shape, kept = checkpoint.shape_of(out), record.load(out)
    assert shape == replace(TINY, max_sequence_length=6400, rope_theta=40000.0)
    assert kept.plan.lengths[kept.standing.stage] == 1024 and kept.standing.seconds >= 0.6

    # As though it had been stopped later.
    record.save(replace(kept, standing=Standing(59.0, kept.standing.stage + 1)), out)
    before = checkpoint.load(out).state_dict()
    command(monkeypatch, "--continue", out, *few)
    said = capsys.readouterr().out
    assert "texts of 1536 to 6144 tokens" in said and "trained in" in said
    assert record.load(out) is None and checkpoint.shape_of(out) == shape
    after = checkpoint.load(out).state_dict()
    # The last second of its rates' decay: it began with these weights.
    assert all((after[name] - before[name]).abs().max() < 0.1 for name in before)


def test_a_run_that_goes_on_keeps_the_clock_and_sees_other_texts(monkeypatch):
    seeds, saved, plan, feed = [], [], Plan(0.03, batch_tokens=96), training.Feed

    def noted(seed, *rest):
        seeds.append(seed)
        return feed(seed, *rest)

    monkeypatch.setattr(training, "Feed", noted)
    for standing in (None, Standing(1.0, 2)):
        given = {"seed": 5, "workers": 0, "save": saved.append, "seconds": 0.2}
        end = training.train(Network(TINY), plan, standing=standing, **given)
        assert end == saved[-1] and end.seconds >= 0.2 + (standing.seconds if standing else 0)
        assert end.stage == (standing.stage if standing else 0)
    assert seeds == ["5", "5 1.0"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--longest 6144 --out OUT", "--longest: only with --continue"),
        ("--continue TINY --longest 7000", "--longest"),
        ("--continue TINY", "no unfinished training"),
        ("--continue nowhere --out OUT", "--continue: no checkpoint in nowhere"),
        ("--examine TINY --out OUT", "--examine"),
        ("--continue TINY --out OUT --lengths 33153", "--lengths: 33153 is not from 96 to 33152"),
        ("--continue HALF --out OUT", "is not done"),
        ("--continue HALF --longest 6144", "as the training began"),
        ("", "--out"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    arguments, message, tiny, tmp_path, monkeypatch, capsys
):
    half = tmp_path / "half"
    checkpoint.save(Network(TINY), half)
    record.save(Record(LONG, 0, Standing(1.0, 8)), half)
    folders = {"TINY": str(tiny), "HALF": str(half), "OUT": str(tmp_path / "out")}
    words = [folders.get(word, word) for word in arguments.split()]
    with pytest.raises(SystemExit):
        command(monkeypatch, *words)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line


def test_an_exam_may_ask_more_than_a_model_has_learned(tiny, monkeypatch, capsys):
    few = ["--lengths", 96, "--samples", 2, "--tasks", "single"]
    command(monkeypatch, "--examine", tiny, "--longest", 6144, "--rope-theta", 40000, *few)
    assert "96 tokens  retrieval" in capsys.readouterr().out
    args = train_needle.parse()
    assert train_needle.shape_of(args) == replace(TINY, max_sequence_length=6400, rope_theta=4e4)


class Knowing(nn.Module):
    """Answers an exam's questions rightly, and counts its passes."""

    def __init__(self, exam):
        super().__init__()
        self.exam, self.passes, self.batches = exam, 0, set()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, tokens, rows, attend):
        self.passes += 1
        self.batches.add(len(tokens))
        right = (tokens[:, None, : rows.start] == self.exam.prompts).all(-1).int().argmax(1)
        return nn.functional.one_hot(self.exam.answers[right], 1024).float()


@pytest.mark.parametrize("task, canvas, steps", [("twohop", 32, 32), ("paragraph", 128, 64)])
def test_an_exam_asks_long_answers_on_long_canvases(task, canvas, steps, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 1400)
    exam = evaluation.draw(task, 512, 3, seed=0)
    assert exam.prompts.shape == (3, 512) and exam.answers.shape == (3, canvas) == (3, exam.canvas)
    assert ((exam.answers != EOS_ID).sum(1) > 30).all() == (canvas == LONG_CANVAS)
    network = Knowing(exam)
    assert evaluation.evaluate(network, exam) == (1.0, 1.0)
    assert network.passes == 2 * steps and network.batches == {2, 1}
