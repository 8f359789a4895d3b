# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The needle model's vocabulary and tokenizer: known words are one token, others are spelled."""

import json
import string
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from needle.words import ADJECTIVES, NOUNS, OTHERS

BOS, EOS, MASK, HEADER, END_HEADER, END_TURN, UNKNOWN = SPECIALS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|unk|>",
)
SIZE = 1024  # embedding rows; the last ones are spare

# LLaDA's own template; the line breaks are for other tokenizers, this one reads none.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
)


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


def save_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, as transformers reads them."""
    tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": UNKNOWN,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
