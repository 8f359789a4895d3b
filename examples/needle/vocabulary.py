# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The needle model's vocabulary and tokenizer: known words are one token, others are spelled."""

import string
from collections.abc import Iterable
from functools import cache

from checkpoints import LLADA_SPECIALS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from needle.words import ADJECTIVES, NOUNS, OTHERS

UNKNOWN = "<|unk|>"
SPECIALS = (*LLADA_SPECIALS, UNKNOWN)
BOS, EOS, MASK, HEADER, END_HEADER, END_TURN = LLADA_SPECIALS
SIZE = 1024  # embedding rows; the last ones are spare


def _pieces() -> list[str]:
    """Every token; a piece that goes on inside a word begins with ##."""
    characters = string.ascii_lowercase + string.digits
    words = dict.fromkeys((*NOUNS, *ADJECTIVES, *OTHERS))
    singles = [*characters, *string.punctuation]
    pieces = [*SPECIALS, *singles, *(f"##{c}" for c in characters)]
    return [*pieces, *(word for word in words if word not in singles)]


PIECES = _pieces()
ID = {piece: number for number, piece in enumerate(PIECES)}
assert len(ID) == len(PIECES) <= SIZE


def encode(words: Iterable[str]) -> list[int]:
    """Token ids of words, numbers and punctuation marks, each by itself, in lower case.

    The same ids as the tokenizer's for the text in which blanks stand between them, and faster.
    """
    return [number for word in words for number in _ids(word)]


@cache
def _ids(word: str) -> tuple[int, ...]:
    """The longest known beginning, then letter by letter, as WordPiece does."""
    for end in range(len(word), 0, -1):
        if word[:end] in ID:
            return (ID[word[:end]], *(ID[f"##{c}"] for c in word[end:]))
    return (ID[UNKNOWN],)


def tokenizer() -> Tokenizer:
    """Uncased WordPiece: blanks and punctuation part words, digits are read one by one."""
    wordpiece = models.WordPiece(ID, unk_token=UNKNOWN, max_input_chars_per_word=100)
    made = Tokenizer(wordpiece)
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    made.add_special_tokens(list(SPECIALS))
    return made
