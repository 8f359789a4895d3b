# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Write the questions of needle*.yaml, one JSON object a line; the same for the same seed.

cd examples/lm_eval
python write_needles.py --tokens 512 --samples 4 > needle.jsonl
python write_needles.py --layout ruler --tokens 512 1024 --samples 2 > needle_ruler.jsonl
python write_needles.py --layout longbench --tokens 512 --samples 2 > needle_longbench.jsonl
python write_needles.py --layout choices --tokens 256 --samples 2 > needle_choices.jsonl
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from needle.tasks import TASKS, Sample, spell
from needle.vocabulary import encode
from needle.words import NOUNS

LONGEST_ANSWER = 31  # tokens: the canvas of the tasks, less its end-of-text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="plain", help="whose fields")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[512], help="of a haystack and its question"
    )
    parser.add_argument("--samples", type=int, default=4, help="questions of each task and length")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for tokens in args.tokens:
        if not 96 <= tokens <= 4500:
            parser.exit(2, f"--tokens must be 96 to 4500, got {tokens}.\n")
    if args.samples < 1:
        parser.exit(2, f"--samples must be at least 1, got {args.samples}.\n")
    for question in questions(args.layout, args.tokens, args.samples, args.seed):
        print(json.dumps(question))


def questions(
    layout: str, lengths: Iterable[int], samples: int, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """`samples` of each task and length, in the fields of the layout."""
    rng = random.Random(seed)
    for tokens in lengths:
        for task in TASKS:
            for _ in range(samples):
                yield LAYOUTS[layout](draw(rng, task, tokens), tokens)


def draw(rng: random.Random, task: str, tokens: int) -> Sample:
    while True:
        sample = TASKS[task](rng, tokens)
        if len(encode(sample.answer)) <= LONGEST_ANSWER:
            return sample


def plain(sample: Sample, tokens: int) -> dict[str, Any]:
    return {"task": sample.task, "text": sample.text, "answer": spell(sample.answer)}


def ruler(sample: Sample, tokens: int) -> dict[str, Any]:
    """RULER counts which of `outputs` an answer holds; `gen_prefix` begins the answer."""
    return {
        "task": sample.task,
        "input": sample.text,
        "outputs": told(sample),
        "max_length": tokens,
        "gen_prefix": "",
    }


def longbench(sample: Sample, tokens: int) -> dict[str, Any]:
    """LongBench compares an answer's words with each of `answers`."""
    return {
        "dataset": sample.task,
        "context": spell(sample.haystack),
        "question": spell(sample.question),
        "answers": [spell(sample.answer)],
        "length": tokens,
    }


def choices(sample: Sample, tokens: int) -> dict[str, Any]:
    """Multiple choice: four answers that differ in what they tell, `label` says which is right."""
    rng = random.Random(spell(sample.answer))
    answers = [sample.answer, *(misled(rng, sample) for _ in range(3))]
    order = rng.sample(range(4), 4)
    return {
        "task": sample.task,
        "text": sample.text,
        "choices": [spell(answers[i]) for i in order],
        "label": order.index(0),
    }


def misled(rng: random.Random, sample: Sample) -> list[str]:
    """The answer with other numbers of as many digits, or other words."""
    wrong = {word: another(rng, word) for word in told(sample)}
    return [wrong.get(word, word) for word in sample.answer]


def another(rng: random.Random, word: str) -> str:
    if word.isdecimal():
        return "".join(rng.choice("123456789".replace(digit, "")) for digit in word)
    return rng.choice([noun for noun in NOUNS if noun != word])


def told(sample: Sample) -> list[str]:
    """What the answer says beyond the question: numbers, variables or a word."""
    said = {*sample.question, *",.", "and", "is"}
    return [word for word in sample.answer if word not in said]


LAYOUTS: dict[str, Callable[[Sample, int], dict[str, Any]]] = {
    layout.__name__: layout for layout in (plain, ruler, longbench, choices)
}


if __name__ == "__main__":
    main()
