# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What texts are made of: keys, numbers, and sentences in which statements are buried.

A text is a list of words; numbers and punctuation marks are words of their own.
"""

import random
import re
import string
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pydoc_data.topics import topics

from needle.vocabulary import ID, encode
from needle.words import ADJECTIVES, NOUNS, OTHERS

Words = list[str]


def number(rng: random.Random) -> str:
    """Mostly of four digits."""
    digits = 4 if rng.random() < 0.5 else rng.randint(1, 10)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def short_key(rng: random.Random) -> Words:
    """A noun, an adjective and a noun, or a made-up name of a few letters."""
    kind = rng.random()
    if kind < 0.6:
        return [rng.choice(NOUNS)]
    if kind < 0.9:
        return [rng.choice(ADJECTIVES), rng.choice(NOUNS)]
    return [letters(rng, 3, 6)]


def key(rng: random.Random) -> Words:
    """A short key, or one of the many other names that things have."""
    if rng.random() < 0.7:
        return short_key(rng)
    first, second = rng.choice(ADJECTIVES + NOUNS), rng.choice(NOUNS)
    makers: tuple[Callable[[], Words], ...] = (
        lambda: [rng.choice(NOUNS), second],
        lambda: [rng.choice(ADJECTIVES), first, second],
        lambda: [first, "-", second],
        lambda: [rng.choice(unknown_words())],
        lambda: [letters(rng, 5, 12)],
        lambda: [second + letters(rng, 1, 4)],
        lambda: [rng.choice((second, letters(rng, 1, 4))) + number(rng)],
        lambda: [letters(rng, 3, 8), letters(rng, 3, 8)],
    )
    return rng.choice(makers)()


def letters(rng: random.Random, fewest: int, most: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(fewest, most)))


def distinct(rng: random.Random, make: Callable[[random.Random], Words], count: int) -> list[Words]:
    keys: dict[tuple[str, ...], None] = {}
    while len(keys) < count:
        keys[tuple(make(rng))] = None
    return [list(made) for made in keys]


def paragraph(rng: random.Random, tokens: int) -> Words:
    """Sentences of different kinds: so many tokens, or at most eight more."""
    words: Words = []
    while (size := len(encode(words))) < tokens:
        sentence = rng.choice((random_sentence, spelled_sentence, prose))(rng)
        if size + len(encode(sentence)) <= tokens + 8 and _reads_as_told(sentence):
            words += sentence
    return words


def _reads_as_told(sentence: Words) -> bool:
    """Whether a tokenizer that tidies up writes what it read, with no "don't" for a "do not"."""
    is_plain = all(word.isalnum() or word in ",.?" for word in sentence)
    return is_plain and ("do", "not") not in pairwise(sentence)


def interleave(rng: random.Random, groups: list[list[Words]]) -> list[Words]:
    """All statements in random order; those of one group keep theirs."""
    turns = [i for i, group in enumerate(groups) for _ in group]
    rng.shuffle(turns)
    left = [iter(group) for group in groups]
    return [next(left[turn]) for turn in turns]


def bury(rng: random.Random, needles: list[Words], budget: int) -> Words:
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
    make = rng.choice((_cliche, random_sentence, spelled_sentence, prose))
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


def random_sentence(rng: random.Random) -> Words:
    return [*rng.choices(_FILLER, k=rng.randint(4, 12)), "."]


def spelled_sentence(rng: random.Random) -> Words:
    """With names and numbers that are not in the vocabulary."""
    words = random_sentence(rng)
    strange = rng.choice((number(rng), letters(rng, 3, 8)))
    words[rng.randrange(len(words) - 1)] = strange
    return words


@cache
def _manual() -> list[Words]:
    """Sentences of Python's manual: plain English that every Python brings along."""
    text = " ".join(" ".join(topics.values()).lower().split())
    parts = (re.findall(r"[a-z]+|[0-9]+|[,?()'-]", part) for part in text.split(". "))
    return [[*part, "."] for part in parts if 4 <= len(part) <= 24]


@cache
def unknown_words() -> list[str]:
    """Words of the manual that the vocabulary lacks."""
    words = {word for sentence in _manual() for word in sentence}
    return sorted(word for word in words if len(word) > 2 and word.isalpha() and word not in ID)


def prose(rng: random.Random) -> Words:
    return rng.choice(_manual())
