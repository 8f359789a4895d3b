# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The benches of others' loops: what they load, time and change, on stand-ins for these loops."""

import json
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import bench_fast_dllm
import bench_sparse_dllm
import pytest
import torch
from caches import checkout, clock, lines
from caches.clock import Load

LOAD = Load(length=64, new_tokens=8, block_length=4, steps=16)
MASK = 9


class Recorder:
    """A model that computes nothing and notes how often it is called."""

    device, config = "cpu", SimpleNamespace(mask_token_id=MASK)

    def __init__(self):
        self.calls = 0

    def __call__(self, tokens, **options):
        self.calls += 1


def loop(model, prompt, steps, gen_length, block_length=4, whole=1):
    """Blocks whose first steps are whole, and whose others compute what is left of the canvas."""
    tokens = torch.zeros(1, prompt.shape[1] + gen_length)
    blocks = gen_length // block_length
    for block in range(blocks):
        for step in range(steps // blocks):
            begin = 0 if step < whole else prompt.shape[1] + block * block_length
            model(tokens[:, begin:])


def test_steps_are_told_apart_by_their_rows():
    steps = clock.time_steps(loop, Recorder(), LOAD.tokens("cpu"), 8, 16)
    assert [step.rows for step in steps] == [64] + 7 * [8] + [64] + 7 * [4]
    assert all(step.seconds > 0 for step in steps)


def test_a_loop_is_ended_after_enough_steps():
    model = Recorder()
    steps = clock.time_steps(loop, model, LOAD.tokens("cpu"), 8, 16, limit=3)
    assert len(steps) == model.calls == 3


@pytest.mark.parametrize("whole", [1, 2])
def test_what_is_added_up_is_what_a_whole_run_takes(whole, monkeypatch):
    """Whole steps of 100 seconds, light ones of as many as they compute rows."""
    now = 0.0

    class Slow(Recorder):
        def __call__(self, tokens, **options):
            nonlocal now
            now += 100 if tokens.shape[1] == LOAD.length else tokens.shape[1]

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    theirs = partial(loop, whole=whole)
    added = clock.project(theirs, Slow(), LOAD, light_steps=2)
    run = clock.run_whole(theirs, Slow(), LOAD)
    assert added["projected"] and not run["projected"]
    assert added["seconds"] == run["seconds"] == 200 * whole + (8 - whole) * (8 + 4)
    assert added["whole_step"] == run["whole_step"] == 100


def test_a_loop_of_other_steps_than_asked_for_is_no_measurement():
    with pytest.raises(AssertionError, match="14 steps, not 15"):
        clock.run_whole(loop, Recorder(), Load(64, 8, 4, 15))


def test_a_checkout_loads_without_what_it_imports(tmp_path):
    source = "from transformers import PreTrainedModel\nfrom einops import rearrange\n"
    source += "from transformers.models.auto import AutoModel\nAutoModel.register(1, 2)\n"
    (tmp_path / "a_network_of_theirs.py").write_text(source)
    before = {name: sys.modules.get(name) for name in checkout.STAND_INS}
    (module,) = checkout.load(tmp_path, "a_network_of_theirs")
    assert module.PreTrainedModel is checkout.Model
    assert {name: sys.modules.get(name) for name in checkout.STAND_INS} == before
    assert str(tmp_path) not in sys.path


def choose(logits, temperature, remasking, open_places, tokens, count, threshold=None):
    """The surest open place, as their get_transfer_index finds it."""
    surest, filled = logits.double().softmax(-1).max(-1)
    filled = torch.where(open_places, filled, tokens)
    place = torch.where(open_places, surest, -torch.inf).argmax(-1)
    return filled, torch.nn.functional.one_hot(place, tokens.shape[1]).bool()


@pytest.mark.parametrize("rows", [8, 20])
def test_choosing_in_the_canvas_alone_chooses_the_same(rows):
    torch.manual_seed(0)
    logits, tokens = torch.randn(1, rows, 32), torch.randint(8, (1, rows))
    open_places = torch.arange(rows)[None] >= rows - 6
    args = logits, 0.0, "low_confidence", open_places, tokens, None
    narrow = partial(bench_fast_dllm.choose_in_canvas, choose, 8)
    for got, expected in zip(narrow(*args), choose(*args), strict=True):
        assert torch.equal(got, expected)


def test_a_softmax_over_its_logits_is_the_softmax(monkeypatch):
    monkeypatch.setattr(bench_sparse_dllm, "ROWS", 3)
    logits = torch.randn(1, 8, 32)
    expected = logits.softmax(-1)
    assert bench_sparse_dllm.softmax_in_place(logits, dim=-1) is logits
    torch.testing.assert_close(logits, expected)


def test_outputs_of_one_whole_step_are_held_at_most():
    def model(tokens, past_key_values=None, use_cache=None):
        layers = [(torch.ones(4), torch.ones(4))] if use_cache else None
        return SimpleNamespace(logits=torch.ones(4), past_key_values=layers)

    model.device = model.config = None
    sparing = bench_fast_dllm.Sparing(model)
    first = sparing(None, use_cache=True)
    light = sparing(None, past_key_values=first.past_key_values, use_cache=True)
    assert light.past_key_values is None
    assert first.logits.untyped_storage().nbytes() == 16
    second = sparing(None, use_cache=True)
    held = [first.logits, *first.past_key_values[0], *second.past_key_values[0]]
    assert [tensor.untyped_storage().nbytes() for tensor in held] == [0, 0, 0, 16, 16]


def test_lines_say_what_was_changed(tmp_path, capsys):
    (tmp_path / "llada").mkdir()
    (tmp_path / "llada" / "generate.py").touch()
    argv = ["--lengths", "64", "128", "--whole-up-to", "64", "--new-tokens", "8"]
    argv += ["--block-length", "4", "--steps", "16", "--checkout", str(tmp_path)]
    args = bench_fast_dllm.parse(argv)
    for length in args.lengths:
        load = Load(length, args.new_tokens, args.block_length, args.steps)
        prepared = nullcontext((loop, Recorder(), ["all of it"]))
        lines.report("fast-dllm", args, "dual", lambda _, it=prepared: it, load)
    short, long = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (short["tokens"], short["projected"]) == (64, False)
    assert (long["tokens"], long["projected"]) == (128, True)
    assert long["patched"] == ["all of it"] and long["checkout"] == tmp_path.name


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_fast_dllm.parse(["--checkout", str(tmp_path)])
    assert "must have llada/generate.py" in capsys.readouterr().err


def test_steps_that_do_not_fill_blocks_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_sparse_dllm.parse(["--checkout", str(tmp_path), "--new-tokens", "100"])
    assert "--new-tokens must be a multiple of --block-length 32" in capsys.readouterr().err
