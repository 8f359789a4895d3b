# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Write the questions of needle.yaml, one JSON object a line; the same for the same seed.

python examples/lm_eval/write_needles.py --tokens 512 --samples 4 > examples/lm_eval/needle.jsonl
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from needle.tasks import TASKS, spell
from needle.vocabulary import encode

LONGEST_ANSWER = 31  # tokens: the canvas of needle.yaml, less its end-of-text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512, help="of a haystack and its question")
    parser.add_argument("--samples", type=int, default=4, help="questions of each task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 96 <= args.tokens <= 4500:
        parser.exit(2, f"--tokens must be 96 to 4500, got {args.tokens}.\n")
    if args.samples < 1:
        parser.exit(2, f"--samples must be at least 1, got {args.samples}.\n")
    rng = random.Random(args.seed)
    for task in TASKS:
        for _ in range(args.samples):
            print(json.dumps(question(rng, task, args.tokens)))


def question(rng: random.Random, task: str, tokens: int) -> dict[str, str]:
    while True:
        sample = TASKS[task](rng, tokens)
        if len(encode(sample.answer)) <= LONGEST_ANSWER:
            return {"task": task, "text": sample.text, "answer": spell(sample.answer)}


if __name__ == "__main__":
    main()
