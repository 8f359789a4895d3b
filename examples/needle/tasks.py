# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Questions over a haystack, after RULER's tasks (arXiv 2404.06654), made on the fly.

A text is a list of words; numbers and punctuation marks are words of their own.
"""

import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics
from typing import Any

from needle.vocabulary import ID, encode
from needle.words import ADJECTIVES, NOUNS, OTHERS

Words = list[str]


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
    names = _distinct(rng, _short_key, count * hops)
    chains = [names[i : i + hops] for i in range(0, len(names), hops)]
    numbers: dict[str, None] = {}
    while len(numbers) < count:
        numbers[_number(rng)] = None
    needles = [_chain(number, chain) for number, chain in zip(numbers, chains, strict=True)]
    question = ["which", "variables", "equal", next(iter(numbers)), "?"]
    haystack = _bury(rng, _interleave(rng, needles), budget - len(encode(question)))
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
    keys = _distinct(rng, _key, asked + others)
    numbers = [[_number(rng) for _ in range(values)] for _ in keys[:asked]]
    told = _usually_first(rng, _STATEMENTS)
    needles = [
        [_statement(told, key, number) for number in row]
        for key, row in zip(keys, numbers, strict=False)
    ]
    needles += [[_statement(told, key, _number(rng))] for key in keys[asked:]]
    question = _question(rng, keys[:asked], values)
    haystack = _bury(rng, _interleave(rng, needles), budget - len(encode(question)))
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


def _number(rng: random.Random) -> str:
    """Mostly of four digits."""
    digits = 4 if rng.random() < 0.5 else rng.randint(1, 10)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _crowd(rng: random.Random, budget: int, asked: int) -> int:
    """How many distractors: few as often as many, up to half of the text."""
    most = max(1, budget // 24 - asked)
    return min(most, round(2 ** rng.uniform(0, 7)))


def _short_key(rng: random.Random) -> Words:
    """A noun, an adjective and a noun, or a made-up name of a few letters."""
    kind = rng.random()
    if kind < 0.6:
        return [rng.choice(NOUNS)]
    if kind < 0.9:
        return [rng.choice(ADJECTIVES), rng.choice(NOUNS)]
    return [_letters(rng, 3, 6)]


def _key(rng: random.Random) -> Words:
    """A short key, or one of the many other names that things have."""
    if rng.random() < 0.7:
        return _short_key(rng)
    first, second = rng.choice(ADJECTIVES + NOUNS), rng.choice(NOUNS)
    makers: tuple[Callable[[], Words], ...] = (
        lambda: [rng.choice(NOUNS), second],
        lambda: [rng.choice(ADJECTIVES), first, second],
        lambda: [first, "-", second],
        lambda: [rng.choice(_unknown_words())],
        lambda: [_letters(rng, 5, 12)],
        lambda: [second + _letters(rng, 1, 4)],
        lambda: [rng.choice((second, _letters(rng, 1, 4))) + _number(rng)],
        lambda: [_letters(rng, 3, 8), _letters(rng, 3, 8)],
    )
    return rng.choice(makers)()


def _letters(rng: random.Random, fewest: int, most: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(fewest, most)))


def _distinct(
    rng: random.Random, make: Callable[[random.Random], Words], count: int
) -> list[Words]:
    keys: dict[tuple[str, ...], None] = {}
    while len(keys) < count:
        keys[tuple(make(rng))] = None
    return [list(key) for key in keys]


def _interleave(rng: random.Random, groups: list[list[Words]]) -> list[Words]:
    """All statements in random order; those of one group keep theirs."""
    turns = [i for i, group in enumerate(groups) for _ in group]
    rng.shuffle(turns)
    left = [iter(group) for group in groups]
    return [next(left[turn]) for turn in turns]


def _bury(rng: random.Random, needles: list[Words], budget: int) -> Words:
    """The needles in their order at random places of a text of exactly `budget` tokens."""
    sentences = _noise(rng, budget - sum(len(encode(needle)) for needle in needles))
    places = sorted(rng.randint(0, len(sentences)) for _ in needles)
    parts, done = [], 0
    for place, needle in zip(places, needles, strict=True):
        parts += [*sentences[done:place], needle]
        done = place
    return [word for part in [*parts, *sentences[done:]] for word in part]


def _noise(rng: random.Random, budget: int) -> list[Words]:
    """Sentences of `budget` tokens that say nothing, of one kind for the whole text."""
    make = rng.choice((_cliche, _random_sentence, _spelled_sentence, _prose))
    sentences = []
    while budget > 0:
        sentence = make(rng)
        while len(ids := encode(sentence)) > budget:
            sentence = sentence[1:]
        budget -= len(ids)
        sentences.append(sentence)
    return sentences


_CLICHES = [
    line.split()
    for line in (
        "the grass is green .",
        "the sky is blue .",
        "the sun is yellow .",
        "here we go .",
        "there and back again .",
    )
]
_FILLER = (*OTHERS, *NOUNS, *ADJECTIVES)


def _cliche(rng: random.Random) -> Words:
    return rng.choice(_CLICHES)


def _random_sentence(rng: random.Random) -> Words:
    return [*rng.choices(_FILLER, k=rng.randint(4, 12)), "."]


def _spelled_sentence(rng: random.Random) -> Words:
    """With names and numbers that are not in the vocabulary."""
    words = _random_sentence(rng)
    strange = rng.choice((_number(rng), _letters(rng, 3, 8)))
    words[rng.randrange(len(words) - 1)] = strange
    return words


@cache
def _manual() -> list[Words]:
    """Sentences of Python's manual: plain English that every Python brings along."""
    text = " ".join(" ".join(topics.values()).lower().split())
    parts = (re.findall(r"[a-z]+|[0-9]+|[,?()'-]", part) for part in text.split(". "))
    return [[*part, "."] for part in parts if 4 <= len(part) <= 24]


@cache
def _unknown_words() -> list[str]:
    """Words of the manual that the vocabulary lacks."""
    words = {word for sentence in _manual() for word in sentence}
    return sorted(word for word in words if len(word) > 2 and word.isalpha() and word not in ID)


def _prose(rng: random.Random) -> Words:
    return rng.choice(_manual())


def fact(rng: random.Random) -> tuple[Words, str]:
    """A key and its number."""
    return _key(rng), _number(rng)


TASKS: dict[str, Callable[[random.Random, int], Sample]] = {
    task.__name__: task for task in (single, multikey, multiquery, multivalue, variables, common)
}
RETRIEVAL = ("single", "multikey", "multiquery", "multivalue")
