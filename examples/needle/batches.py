# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Training examples of one length: which tokens, and which of them are masked."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from needle import tasks, texts
from needle.tasks import Sample
from needle.texts import Words
from needle.vocabulary import BOS, END_HEADER, END_TURN, EOS, HEADER, ID, MASK, encode

MASK_ID, EOS_ID = ID[MASK], ID[EOS]
CANVASES = (16, 24, 32, 48, 64)  # tokens of an answer and the end-of-text that fills it up
RECALL = "recall"
KINDS = (*tasks.ALL_TASKS, RECALL)
SHARES = {  # of the questions; the tasks with the fewest tokens to learn from are asked more often
    "single": 0.08,
    "multikey": 0.2,
    "multiquery": 0.17,
    "multivalue": 0.15,
    "variables": 0.2,
    "common": 0.2,
}
Canvases = tuple[tuple[int, Mapping[str, float]], ...]  # each as likely; tokens, tasks' shares
SHORT: Canvases = tuple((size, SHARES) for size in CANVASES)
LONG: Canvases = (  # a third of the questions has the longest canvas, where texts have room for it
    *((size, {**SHARES, "twohop": 0.25}) for size in CANVASES),
    *3 * ((tasks.LONG_CANVAS, {**SHARES, "twohop": 0.25, "paragraph": 1.0, "listing": 0.75}),),
)
MANY = 200  # facts: of 1400 keys drawn at will a third would come twice, with two numbers each
PLAIN_END = ("answer", ":")  # of a prompt that is no chat


@dataclass(frozen=True)
class Example:
    """One text: its token ids, the places that are asked for, and what it trains."""

    ids: list[int]
    asked: list[bool]
    kind: int  # index into KINDS


@dataclass(frozen=True)
class Batch:
    """Examples of one length, and for each the places that are masked."""

    ids: np.ndarray  # int64 [batch, tokens]
    masked: np.ndarray  # bool [batch, tokens]
    kinds: np.ndarray  # int64 [batch]


def chat_ids(words: Words) -> list[int]:
    """The prompt of one user message, as the chat template writes it."""
    user, assistant = (
        [ID[HEADER], *encode([role]), ID[END_HEADER]] for role in ("user", "assistant")
    )
    return [ID[BOS], *user, *encode(words), ID[END_TURN], *assistant]


CHAT_TOKENS = len(chat_ids([]))


def prompt_ids(sample: Sample, *, plain: bool = False) -> list[int]:
    """A chat, or plain text that ends with "answer:"."""
    words = sample.haystack + sample.question
    return encode([*words, *PLAIN_END]) if plain else chat_ids(words)


def pose(rng: random.Random, task: str, length: int, canvas: int) -> tuple[list[int], list[int]]:
    """A chat prompt of exactly `length` tokens, and its answer, which leaves the canvas room."""
    while True:
        sample = tasks.ALL_TASKS[task](rng, length - CHAT_TOKENS)
        prompt, answer = prompt_ids(sample), encode(sample.answer)
        if len(prompt) == length and len(answer) < canvas:
            return prompt, answer


def question(rng: random.Random, length: int, canvases: Canvases = SHORT) -> Example:
    """A prompt and the canvas behind it, `length` tokens together."""
    while True:
        canvas, shares = rng.choice([one for one in canvases if one[0] <= length // 4])
        plain = rng.random() < 0.25
        room = length - canvas - (len(PLAIN_END) if plain else CHAT_TOKENS)
        (task,) = rng.choices(list(shares), list(shares.values()))
        sample = tasks.ALL_TASKS[task](rng, room)
        prompt, answer = prompt_ids(sample, plain=plain), encode(sample.answer)
        if len(prompt) + canvas == length and len(answer) < canvas:
            break
    ids = prompt + answer + [EOS_ID] * (canvas - len(answer))
    return Example(ids, [place >= len(prompt) for place in range(length)], KINDS.index(task))


def recall(rng: random.Random, length: int) -> Example:
    """Facts told twice, one telling with a gap: every place of the text trains key matching.

    Questions alone supervise a few tokens of a text, and the heads that find a key by its name
    are slow to form.
    """
    count = max(1, length // 24)
    if count > MANY:
        facts = [(key, texts.number(rng)) for key in texts.distinct(rng, texts.key, count)]
    else:
        facts = [(texts.key(rng), texts.number(rng)) for _ in range(count)]
    tellings = [(fact, gap) for fact in facts for gap in (False, True)]
    rng.shuffle(tellings)
    ids: list[int] = []
    asked: list[bool] = []
    for (key, number), gap in tellings:
        telling, hidden = _telling(rng, key, number)
        ids += telling
        asked += [gap and place in hidden for place in range(len(telling))]
    fill = length - len(ids)
    ids, asked = ids + encode(["."]) * fill, asked + [False] * fill
    return Example(ids[:length], asked[:length], KINDS.index(RECALL))


def _telling(rng: random.Random, key: Words, number: str) -> tuple[list[int], range]:
    """Token ids of one sentence, and the places of its number, or now and then of its key."""
    start = encode(["the", "special", "number", "for"] if rng.random() < 0.3 else [])
    named, value = encode(key), encode([number])
    if rng.random() < 0.2:
        hidden = range(len(start), len(start) + len(named))
    else:
        first = len(start) + len(named) + 1
        hidden = range(first, first + len(value))
    return [*start, *named, *encode(["is"]), *value, *encode(["."])], hidden


def make(
    rng: random.Random, length: int, size: int, recall_share: float, canvases: Canvases = SHORT
) -> Batch:
    """Draw examples, and mask the asked places of each with a chance of its own (LLaDA's t)."""
    drawn = [
        recall(rng, length) if rng.random() < recall_share else question(rng, length, canvases)
        for _ in range(size)
    ]
    noise = np.random.default_rng(rng.getrandbits(63))
    chance = np.minimum(noise.random((size, 1)) * 1.15, 1)  # 13% are all masks, as at step 0
    asked = np.array([example.asked for example in drawn])
    masked = asked & (noise.random((size, length)) < chance)
    ids = np.array([example.ids for example in drawn], dtype=np.int64)
    return Batch(ids, masked, np.array([example.kind for example in drawn]))
