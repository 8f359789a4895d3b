# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The needle model: its tasks and tokenizer, its training, and what it finds through the engine."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import train_needle
from needle import batches, checkpoint, evaluation, tasks, training, vocabulary
from needle.network import Network, Shape
from needle.plan import LENGTHS, Plan
from needle.training import Trainer
from vllm import SamplingParams

TINY_SIZES = {"n_layers": 1, "n_heads": 1, "d_model": 64, "mlp_hidden_size": 64}
TINY = Shape(**TINY_SIZES)
SHORT = Plan(minutes=0.03, batch_tokens=96)


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("length", [200, 1000])
def test_a_task_fills_its_length_and_reads_as_its_tokens(task, length):
    tokenizer = vocabulary.tokenizer()
    for seed in range(20):
        sample = tasks.TASKS[task](random.Random(seed), length)
        ids = vocabulary.encode(sample.haystack + sample.question)
        assert len(ids) == length
        assert tokenizer.encode(sample.text).ids == ids
        assert tokenizer.decode(vocabulary.encode(sample.answer)) == tasks.spell(sample.answer)


@pytest.mark.parametrize("task", tasks.RETRIEVAL)
def test_the_answer_lies_in_the_haystack(task):
    for seed in range(20):
        sample = tasks.TASKS[task](random.Random(seed), 500)
        numbers = [word for word in sample.answer if word.isdigit()]
        assert numbers
        assert set(numbers) <= set(sample.haystack)


def test_known_words_are_one_token_and_others_are_spelled():
    tokenizer = vocabulary.tokenizer()
    tokens = tokenizer.encode("Apple, zorp: 42").tokens
    assert tokens == ["apple", ",", "z", "##o", "##r", "##p", ":", "4", "##2"]
    assert (
        tokenizer.decode(tokenizer.encode("A zorp is 42, or not.").ids) == "a zorp is 42, or not."
    )


def test_the_shipped_tokenizer_is_the_vocabulary():
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(checkpoint.SHIPPED)
    words = ["the", "number", "of", "apple", "is", "4711", "."]
    chat = [{"role": "user", "content": tasks.spell(words)}]
    ids = shipped.apply_chat_template(chat, tokenize=True)["input_ids"]
    assert ids == batches.chat_ids(words)


def test_the_mask_is_special_and_reads_and_writes_as_before(tmp_path):
    from transformers import AutoTokenizer

    checkpoint.save(Network(TINY), tmp_path)
    text = "The number of zorp is 4711, or not."
    for folder in (checkpoint.SHIPPED, tmp_path):
        read = AutoTokenizer.from_pretrained(folder)
        ids = read.encode(text, add_special_tokens=False)
        assert ids == vocabulary.tokenizer().encode(text).ids
        assert read.decode(ids, skip_special_tokens=True) == text.lower()
        assert read.mask_token_id == vocabulary.ID[vocabulary.MASK]
        assert read.mask_token_id in read.all_special_ids


@pytest.mark.parametrize("length", [96, 512])
def test_a_batch_masks_only_what_is_asked_for(length):
    batch = batches.make(random.Random(0), length, 16, recall_share=0.5)
    assert batch.ids.shape == batch.masked.shape == (16, length)
    questions = batch.kinds != batches.KINDS.index(batches.RECALL)
    assert not batch.masked[questions, : length // 2].any()
    assert batch.masked.any(1).sum() > 8


def test_training_learns_a_batch_by_heart():
    torch.manual_seed(0)
    trainer = Trainer(Network(TINY), Plan(minutes=1, adam_rate=1e-2, muon_rate=2e-2))
    batch = batches.make(random.Random(0), LENGTHS[0], 4, recall_share=1.0)
    before = trainer.count()
    for _ in range(50):
        trainer.step(batch, rate=1.0)
    half = trainer.count()
    for _ in range(50):
        trainer.step(batch, rate=1.0)
    now = trainer.count()
    assert now.scores_since(half, 0)[batches.RECALL] > 0.5
    assert now.loss_since(half) < half.loss_since(before)


def test_a_loss_that_is_no_number_ends_the_training_before_it_is_saved(monkeypatch):
    network, saved = Network(TINY), []
    torch.nn.init.constant_(network.model["transformer"]["wte"].weight, float("nan"))
    with pytest.raises(FloatingPointError, match="loss is not a number"):
        training.train(network, SHORT, seed=0, workers=0, save=saved.append)
    assert not saved


def test_a_line_comes_with_the_first_step_and_then_by_the_clock(monkeypatch, capsys):
    monkeypatch.setattr(training, "LINE", 0.5)
    saved = []
    training.train(Network(TINY), SHORT, seed=0, workers=0, save=saved.append)
    lines = capsys.readouterr().out.splitlines()
    assert " step 1," in lines[0] and 3 <= len(lines) <= 6
    assert all(re.search(r"\d s left  step \d+, [\d.]+ a second  loss \d", line) for line in lines)
    assert len(saved) >= len(lines) - 1


def test_rates_warm_up_by_steps_or_by_time_and_fall_to_zero():
    plan = Plan(1)
    assert plan.rate(0, 0) == pytest.approx(1 / 300)
    assert plan.rate(300, 0.01) == plan.rate(10, 0.2) == 1
    assert plan.rate(9, 0.05) == 0.5
    assert plan.rate(10**6, 1) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_leaves_a_checkpoint(number, tmp_path):
    """A second of training ends a process; its workers end with it."""
    script = Path(train_needle.__file__)
    program = "; ".join(
        [
            "import signal; from needle import training; import train_needle",
            # A shell's background jobs inherit that SIGINT is ignored.
            "signal.signal(signal.SIGINT, signal.default_int_handler)",
            "training.LINE = 0.1",
            # A step of the whole network takes a minute where there is no arithmetic in bf16.
            "from functools import partial",
            f"train_needle.Shape = partial(train_needle.Shape, **{TINY_SIZES})",
            "train_needle.main()",
        ]
    )
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--minutes", "5", "--workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(script.parent)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            wait_for(out / "tokenizer_config.json")
            process.send_signal(number)
            _, message = process.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the worker too
    assert process.returncode == 1
    assert message == f"interrupted: {out} holds the last checkpoint\n"
    assert torch.isfinite(checkpoint.load(out).model["transformer"]["wte"].weight).all()


def wait_for(file):
    end = time.monotonic() + 300
    while not file.exists():
        assert time.monotonic() < end, f"no {file}"
        time.sleep(0.1)


def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    network = Network(TINY)
    checkpoint.save(network, tmp_path)
    before = (tmp_path / checkpoint.WEIGHTS).read_bytes()

    def interrupted(weights, file, metadata):
        file_path = Path(file)
        file_path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(network, tmp_path)
    assert (tmp_path / checkpoint.WEIGHTS).read_bytes() == before
    loaded = checkpoint.load(tmp_path).state_dict()
    for name, weight in network.state_dict().items():
        assert torch.equal(loaded[name], weight.bfloat16().float())


@pytest.mark.parametrize(
    "arguments",
    ["--minutes 0", "--minutes nan", "--samples 0", "--tasks juggling", "--lengths 9000"],
)
def test_nonsense_is_refused_in_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_needle.py", "--out", "x", *arguments.split()])
    with pytest.raises(SystemExit):
        train_needle.parse()
    name = arguments.split()[0]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert name in line


@pytest.mark.parametrize("folder", [checkpoint.SHIPPED, checkpoint.LONG], ids=["short", "long"])
def test_a_shipped_model_is_small(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 15_000_000


@pytest.mark.engine
def test_the_engine_finds_needles(needle):
    exams = [evaluation.draw(task, 300, 2, seed=1) for task in ("single", "multikey")]
    canvas = evaluation.CANVAS
    params = SamplingParams(temperature=0, max_tokens=canvas, extra_args={"steps": canvas})
    prompts = [ids for exam in exams for ids in exam.prompts.tolist()]
    outputs = needle.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    tokenizer = needle.get_tokenizer()
    answers = [ids for exam in exams for ids in exam.answers.tolist()]
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    assert [output.outputs[0].text.strip() for output in outputs] == expected
