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


def _retrieval(
    task: str, rng: random.Random, budget: int, *, asked: int, values: int, others: int
) -> Sample:
    keys = texts.distinct(rng, texts.key, asked + others)
    numbers = [[texts.number(rng) for _ in range(values)] for _ in keys[:asked]]
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


def _question(rng: random.Random, keys: list[Words], values: int) -> Words:
    one, every, many = _usually_first(rng, _QUESTIONS)
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


TASKS: dict[str, Callable[[random.Random, int], Sample]] = {
    task.__name__: task for task in (single, multikey, multiquery, multivalue, variables, common)
}
RETRIEVAL = ("single", "multikey", "multiquery", "multivalue")
