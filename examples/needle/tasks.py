# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Questions over a haystack, after RULER's tasks (arXiv 2404.06654), made on the fly."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from needle import texts
from needle.texts import Words
from needle.vocabulary import encode
from needle.words import NOUNS


@dataclass(frozen=True)
class Sample:
    """A haystack with needles in it, a question about them, and the only right answer."""

    task: str
    haystack: Words
    question: Words
    answer: Words

    @property
    def text(self) -> str:
        """What a user would send."""
        return spell(self.haystack + self.question)


def spell(words: Words) -> str:
    """Plain text: no blank before a punctuation mark."""
    return "".join(word if word in ".,?" else f" {word}" for word in words).strip()


def single(rng: random.Random, budget: int) -> Sample:
    """One needle, one question."""
    return _retrieval("single", rng, budget, asked=1, values=1, others=0)


def multikey(rng: random.Random, budget: int) -> Sample:
    """One question, and needles with other keys that pose as the right one."""
    return _retrieval("multikey", rng, budget, asked=1, values=1, others=_crowd(rng, budget, 1))


def multiquery(rng: random.Random, budget: int) -> Sample:
    """Two to four keys asked for at once."""
    asked = min(rng.randint(2, 4), max(1, budget // 24))
    others = _crowd(rng, budget, asked)
    return _retrieval("multiquery", rng, budget, asked=asked, values=1, others=others)


def multivalue(rng: random.Random, budget: int) -> Sample:
    """Two to four numbers for one key, to be told in the order of the text."""
    values = min(rng.randint(2, 4), max(1, budget // 24))
    others = _crowd(rng, budget, values)
    return _retrieval("multivalue", rng, budget, asked=1, values=values, others=others)


def variables(rng: random.Random, budget: int) -> Sample:
    """Chains of assignments; which variables hold the number that one chain begins with?"""
    hops = min(rng.randint(2, 5), max(2, budget // 24))
    count = rng.randint(1, max(1, min(6, budget // (12 * hops))))
    names = texts.distinct(rng, texts.short_key, count * hops)
    chains = [names[i : i + hops] for i in range(0, len(names), hops)]
    numbers: dict[str, None] = {}
    while len(numbers) < count:
        numbers[texts.number(rng)] = None
    needles = [_chain(number, chain) for number, chain in zip(numbers, chains, strict=True)]
    question = ["which", "variables", "equal", next(iter(numbers)), "?"]
    haystack = texts.bury(rng, texts.interleave(rng, needles), budget - len(encode(question)))
    return Sample("variables", haystack, question, [*_listed(chains[0]), "."])


def common(rng: random.Random, budget: int) -> Sample:
    """One word is at least half as frequent again as any other: no single place tells."""
    question = ["which", "word", "is", "the", "most", "common", "?"]
    count = budget - len(question)
    kinds = rng.sample(NOUNS, rng.randint(4, 24))
    rest = [1 + rng.random() for _ in kinds[1:]]
    weights = [max(rest) * rng.uniform(1.5, 3), *rest]
    counts = [round(count * weight / sum(weights)) for weight in weights]
    words = [word for word, n in zip(kinds, counts, strict=True) for _ in range(n)]
    words = (words + kinds[1:] * count)[:count]  # rounding leaves some places
    rng.shuffle(words)
    return Sample("common", words, question, [kinds[0], "."])


def twohop(rng: random.Random, budget: int) -> Sample:
    """The number of a key's house: the text tells the house's name, and elsewhere its number.

    Other keys have houses too, and the key may have a number of its own.
    """
    count = 1 + min(max(1, budget // 56 - 1), round(2 ** rng.uniform(0, 6)))
    houses = texts.distinct(rng, texts.short_key, count)
    keys = [key for key in texts.distinct(rng, texts.key, 2 * count) if key not in houses][:count]
    numbers = [texts.number(rng) for _ in houses]
    told = _usually_first(rng, _STATEMENTS)
    needles = [_statement(told, *pair) for pair in zip(houses, numbers, strict=True)]
    needles += [[*_HOUSE, *key, "is", *house, "."] for key, house in zip(keys, houses, strict=True)]
    if rng.random() < 0.5:
        needles.append(_statement(told, keys[0], texts.number(rng)))
    rng.shuffle(needles)
    # Not "what is the house of KEY ?": that asks for its name.
    question = _question(rng, [[*_HOUSE, *keys[0]]], 1, _QUESTIONS[:-1])
    haystack = texts.bury(rng, needles, budget - len(encode(question)))
    return Sample("twohop", haystack, question, [*houses[0], "is", numbers[0], "."])


def paragraph(rng: random.Random, budget: int) -> Sample:
    """A named paragraph of 31 to 120 tokens, to be copied; others have other names."""
    count = 1 + min(budget // 256, round(2 ** rng.uniform(0, 5)))
    names = texts.distinct(rng, texts.short_key, count)
    told = [texts.paragraph(rng, rng.randint(32, max(32, min(112, budget // 2)))) for _ in names]
    needles = [
        [*_TEXT, *name, "is", ":", *words, "end", "of", *_TEXT, *name, "."]
        for name, words in zip(names, told, strict=True)
    ]
    rng.shuffle(needles)
    question = ["what", "is", *_TEXT, *names[0], "?"]
    haystack = texts.bury(rng, needles, budget - len(encode(question)))
    return Sample("paragraph", haystack, question, told[0])


def listing(rng: random.Random, budget: int) -> Sample:
    """All numbers of one key, 8 to 16 if so many fit, to be told in the order of the text."""
    values = min(rng.randint(8, 16), max(1, budget // 24))
    others = _crowd(rng, budget, values)
    return _retrieval("listing", rng, budget, asked=1, values=values, others=others)


_HOUSE, _TEXT = ["the", "house", "of"], ["the", "text", "of"]


def _retrieval(
    task: str, rng: random.Random, budget: int, *, asked: int, values: int, others: int
) -> Sample:
    keys = texts.distinct(rng, texts.key, asked + others)
    numbers = [_numbers(rng, values) for _ in keys[:asked]]
    told = _usually_first(rng, _STATEMENTS)
    needles = [
        [_statement(told, key, number) for number in row]
        for key, row in zip(keys, numbers, strict=False)
    ]
    needles += [[_statement(told, key, texts.number(rng))] for key in keys[asked:]]
    question = _question(rng, keys[:asked], values)
    haystack = texts.bury(rng, texts.interleave(rng, needles), budget - len(encode(question)))
    answer: Words = []
    for key, row in zip(keys, numbers, strict=False):
        answer += [*([","] if answer else []), *key, "is", *_listed([[n] for n in row])]
    return Sample(task, haystack, question, [*answer, "."])


# The first of each is the usual one; the second is RULER's own.
_STATEMENTS = (
    "the special number for {} is {} .",
    "one of the special magic numbers for {} is : {} .",
    "the number of {} is {} .",
    "{} has the number {} .",
    "the magic number of {} is {} .",
    "the number for {} is : {} .",
    "{} : {} .",
    "{} is {} .",
    "{} = {} .",
    "{1} is the number of {0} .",
)
# For one number, for all numbers of one key, and for the numbers of several keys.
_QUESTIONS = (
    (
        "what is the special number for {} ?",
        "what are all the special numbers for {} ?",
        "what are the special numbers for {} ?",
    ),
    (
        "what is the special magic number for {} mentioned in the provided text ?",
        "what are all the special magic numbers for {} mentioned in the provided text ?",
        "what are the special magic numbers for {} mentioned in the provided text ?",
    ),
    ("what number does {} have ?", "what numbers does {} have ?", "what numbers do {} have ?"),
    ("what is the number of {} ?", "what are the numbers of {} ?", "what are the numbers of {} ?"),
    (
        "tell me the number for {} .",
        "tell me all the numbers for {} .",
        "tell me the numbers for {} .",
    ),
    ("what is {} ?", "what is {} ?", "what is {} ?"),
)


def _usually_first(rng: random.Random, templates: tuple[Any, ...]) -> Any:
    return templates[0] if rng.random() < 0.5 else rng.choice(templates)


def _statement(template: str, key: Words, number: str) -> Words:
    return template.format(" ".join(key), number).split()


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Numbers of one key. Many have three to six digits each: 33 tokens or more, on one canvas."""
    if count < 8:
        return [texts.number(rng) for _ in range(count)]
    ranges = [(10**digits, 10 ** (digits + 1)) for digits in rng.choices(range(2, 6), k=count)]
    return [str(rng.randrange(*ends)) for ends in ranges]


def _question(
    rng: random.Random,
    keys: list[Words],
    values: int,
    forms: tuple[tuple[str, str, str], ...] = _QUESTIONS,
) -> Words:
    one, every, many = _usually_first(rng, forms)
    template = many if len(keys) > 1 else every if values > 1 else one
    return template.format(" ".join(_listed(keys))).split()


def _chain(number: str, names: list[Words]) -> list[Words]:
    """The first variable holds the number, each other one its predecessor."""
    values = [[number], *names[:-1]]
    pairs = zip(names, values, strict=True)
    return [["variable", *name, "equals", *value, "."] for name, value in pairs]


def _listed(items: list[Words]) -> Words:
    return [word for i, item in enumerate(items) for word in ([","] if i else []) + item]


def _crowd(rng: random.Random, budget: int, asked: int) -> int:
    """How many distractors: few as often as many, up to half of the text."""
    most = max(1, budget // 24 - asked)
    return min(most, round(2 ** rng.uniform(0, 7)))


Task = Callable[[random.Random, int], Sample]
TASKS: dict[str, Task] = {
    task.__name__: task for task in (single, multikey, multiquery, multivalue, variables, common)
}
RETRIEVAL = ("single", "multikey", "multiquery", "multivalue")
# Besides, the model for long contexts learns these.
LONG_TASKS: dict[str, Task] = {task.__name__: task for task in (twohop, paragraph, listing)}
ALL_TASKS = TASKS | LONG_TASKS
LONG_CANVAS = 128  # tokens: what holds the answers of all tasks


def that_fit(canvas: int) -> list[str]:
    """The tasks whose answers fit on a canvas of so many tokens."""
    return [task for task in ALL_TASKS if canvas >= LONG_CANVAS or task not in _LONG_ANSWERS]


_LONG_ANSWERS = ("paragraph", "listing")
