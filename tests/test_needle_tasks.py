# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The needle model's tasks for long contexts: their answers are the only right ones."""

import hashlib
import json
import random
import re

import pytest
from needle import batches, tasks, texts, vocabulary

LENGTHS = [400, 2000, 33000]
TOLD = [  # the ten forms in which a number is told
    "the special number for KEY is NUMBER .",
    "one of the special magic numbers for KEY is : NUMBER .",
    "the number of KEY is NUMBER .",
    "KEY has the number NUMBER .",
    "the magic number of KEY is NUMBER .",
    "the number for KEY is : NUMBER .",
    "KEY : NUMBER .",
    "KEY is NUMBER .",
    "KEY = NUMBER .",
    "NUMBER is the number of KEY .",
]
ASKED = re.compile(
    r"what (?:is|are) (?:all )?the special numbers? for (.+) \?"
    r"|what (?:is|are) (?:all )?the special magic numbers? for (.+)"
    r" mentioned in the provided text \?"
    r"|what numbers? does (.+) have \?"
    r"|what (?:is|are) the numbers? of (.+) \?"
    r"|tell me (?:all )?the numbers? for (.+) \."
    r"|what is (.+) \?"
)


def drawn(task, length, count=12):
    for seed in range(count):
        yield tasks.ALL_TASKS[task](random.Random(seed), length)


def asked_for(sample):
    """The key that a question asks for."""
    match = ASKED.fullmatch(" ".join(sample.question))
    return next(group for group in match.groups() if group)


def numbers_of(key, sample):
    """All numbers that a text tells of a key, in its order."""
    forms = "|".join(
        re.escape(form).replace("KEY", re.escape(key)).replace("NUMBER", r"(\d+)") for form in TOLD
    )
    found = re.findall(rf"(?<= \. )(?:{forms})(?= )", f" . {' '.join(sample.haystack)} ")
    return ["".join(groups) for groups in found]


@pytest.mark.parametrize("length", LENGTHS)
def test_the_number_behind_two_hops_is_told_once(length):
    for sample in drawn("twohop", length):
        text = " ".join(sample.haystack)
        key = asked_for(sample).removeprefix("the house of ")
        (house,) = re.findall(rf" the house of {re.escape(key)} is ([^.]+) \.", f" {text}")
        (number,) = numbers_of(house, sample)
        assert " ".join(sample.answer) == f"{house} is {number} ."
        assert text.count("the house of") > 1  # others pose as the right one
        assert house not in " ".join(sample.question).split(key)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_paragraph_of_a_name_is_told_once(length):
    for sample in drawn("paragraph", length):
        name = asked_for(sample).removeprefix("the text of ")
        told = rf" the text of {re.escape(name)} is : (.+?) end of the text of {re.escape(name)} \."
        (copied,) = re.findall(told, " " + " ".join(sample.haystack))
        assert " ".join(sample.answer) == copied


@pytest.mark.parametrize("length", LENGTHS)
def test_a_list_holds_all_numbers_of_its_key_in_the_order_of_the_text(length):
    for sample in drawn("listing", length):
        key = asked_for(sample)
        numbers = numbers_of(key, sample)
        assert 8 <= len(numbers) <= 16
        assert " ".join(sample.answer) == f"{key} is {' , '.join(numbers)} ."


@pytest.mark.parametrize("task", tasks.LONG_TASKS)
def test_a_long_task_fills_its_length_and_reads_as_its_tokens(task):
    tokenizer = vocabulary.tokenizer()
    for sample in drawn(task, 1000, 20):
        ids = vocabulary.encode(sample.haystack + sample.question)
        assert len(ids) == 1000
        assert tokenizer.encode(sample.text).ids == ids
        assert tokenizer.decode(vocabulary.encode(sample.answer)) == tasks.spell(sample.answer)


@pytest.mark.parametrize("task", ["paragraph", "listing"])
@pytest.mark.parametrize("length", [512 - tasks.LONG_CANVAS, 4096])
def test_a_long_answer_fills_more_than_a_quarter_of_its_canvas(task, length):
    for seed in range(20):
        prompt, answer = batches.pose(random.Random(seed), task, length, tasks.LONG_CANVAS)
        assert len(prompt) == length and 30 < len(answer) < tasks.LONG_CANVAS


def test_a_canvas_holds_the_answers_of_the_tasks_that_fit():
    assert tasks.that_fit(32) == [*tasks.TASKS, "twohop"]
    assert tasks.that_fit(tasks.LONG_CANVAS) == list(tasks.ALL_TASKS)
    for task in tasks.that_fit(32):
        assert len(batches.pose(random.Random(0), task, 300, 32)[1]) < 32


@pytest.mark.parametrize("length", [96, 512, 2176])
def test_a_long_training_asks_all_tasks_where_texts_have_room(length):
    batch = batches.make(random.Random(0), length, 120, 0.1, batches.LONG)
    kinds = {batches.KINDS[kind] for kind in batch.kinds}
    long = {"paragraph", "listing"}
    assert kinds == set(batches.KINDS) - (long if length < 4 * tasks.LONG_CANVAS else set())
    asked = batch.masked.sum(1)[[batches.KINDS[kind] in long for kind in batch.kinds]]
    assert (asked <= tasks.LONG_CANVAS).all()


def test_what_a_long_text_recalls_is_told_elsewhere_with_one_number():
    example = batches.recall(random.Random(0), 33024)
    pieces = [vocabulary.PIECES[i] for i in example.ids]
    text = " ".join(pieces).replace(" ##", "")
    told = re.findall(
        r"(?<= \. )(?:the special number for )?([^.]+) is (\d+)(?= \. )", f" . {text}"
    )
    numbers = {}
    for key, number in told:
        numbers.setdefault(key, set()).add(number)
    assert len(numbers) > 1300 and all(len(told) == 1 for told in numbers.values())
    assert sum(example.asked) > 5000


def test_the_tasks_of_published_tables_draw_what_they_drew(monkeypatch):
    # Not Python's manual, which changes with Python.
    manual = [f"plain english number {i} of a manual .".split() for i in range(40)]
    monkeypatch.setattr(texts, "_manual", lambda: manual)
    monkeypatch.setattr(texts, "unknown_words", lambda: ["abrasive", "zither"])
    drawn = hashlib.sha256()
    for task in tasks.TASKS:
        for length, canvas in ((96, 16), (300, 32), (2000, 64)):
            posed = batches.pose(random.Random(7), task, length, canvas)
            drawn.update(json.dumps(posed).encode())
    for length in (96, 512, 1536):
        batch = batches.make(random.Random(5), length, 12, 0.3)
        drawn.update(json.dumps([batch.ids.tolist(), batch.masked.tolist()]).encode())
    assert drawn.hexdigest()[:16] == "75c4e1db339c089e"
