# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How likely a model finds a given answer: what is masked, and what is added up.

    monte_carlo  get_log_likelihood.py (github.com/ML-GSAI/LLaDA; arXiv 2502.09992)
    confidence   get_loglikelihood_confidence() of iLLaDA's evaluation (arXiv 2606.25331),
                 eval_illada.py as public copies have it (github.com/cekim10/LLaDA)
    is_greedy    suffix_greedy_prediction() of LLaDA's eval_llada.py

Each is a generator that yields the passes it needs and is sent their scores, so that the passes of
many questions are computed together (`run`), by whatever computes one.
"""

import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

Ids = tuple[int, ...]
Result = TypeVar("Result", float, bool)


class Pass(NamedTuple):
    """One run of the model over a text.

    token_ids: the text, masked at `places`;  tokens: the answer's own there
    num_prompt: how many tokens are prompt
    """

    token_ids: Ids
    places: Ids
    tokens: Ids
    num_prompt: int


class Scores(NamedTuple):
    """What the model says of a pass's places, in its softmax over all tokens; [places] each.

    logprobs: of the answer's own tokens;  best, best_logprobs: the likeliest token, and its own
    """

    logprobs: Sequence[float]
    best: Sequence[int]
    best_logprobs: Sequence[float]


Estimate = Generator[list[Pass], list[Scores], Result]
"""Yields passes, is sent their scores, returns the estimate."""


class Text(NamedTuple):
    """A prompt, its answer and what stands behind the answer, which is always shown."""

    prompt: Ids
    answer: Ids
    suffix: Ids = ()

    def masked(self, places: Iterable[int], mask_token_id: int) -> Pass:
        """The pass that sees all but some places of the answer, counted from its first."""
        hidden = tuple(places)
        answer = list(self.answer)
        for place in hidden:
            answer[place] = mask_token_id
        start = len(self.prompt)
        return Pass(
            (*self.prompt, *answer, *self.suffix),
            tuple(start + place for place in hidden),
            tuple(self.answer[place] for place in hidden),
            start,
        )


def monte_carlo(text: Text, mask_token_id: int, num_samples: int, seed: int = 0) -> Estimate[float]:
    """LLaDA's estimate of the answer's log-likelihood given the prompt (its lower bound).

    The mean over `num_samples` masks of the masked tokens' log probabilities, each times the
    answer's length over the number of masks. The masks depend on the seed and the text alone.
    """
    rng = random.Random(repr((seed, text)))
    drawn = draw_masks(len(text.answer), num_samples, rng)
    counts = Counter(text.masked(places, mask_token_id) for places in drawn)
    scores = yield list(counts)
    means = (
        count * sum(score.logprobs) / len(score.logprobs)
        for count, score in zip(counts.values(), scores, strict=True)
    )
    return len(text.answer) * sum(means) / num_samples


def draw_masks(length: int, num_samples: int, rng: random.Random) -> Iterator[Ids]:
    """Places to mask among `length`, a sample each: how many is uniform in 1 to `length`.

    The numbers of a run of samples are spread evenly and share one offset, as LLaDA's are within a
    batch. (Theirs round half to even, which favours even numbers; here they are rounded down.)
    """
    offset = rng.randrange(length)
    for sample in range(num_samples):
        num_masked = 1 + (offset + sample * length // num_samples) % length
        yield tuple(sorted(rng.sample(range(length), num_masked)))


def confidence(text: Text, mask_token_id: int) -> Estimate[float]:
    """iLLaDA's score of an answer: its tokens are shown one by one, the likeliest first.

    The sum of their log probabilities, each where it was shown. A pass a token.
    """
    masked, total = list(range(len(text.answer))), 0.0
    while masked:
        (scores,) = yield [text.masked(masked, mask_token_id)]
        surest = max(range(len(masked)), key=scores.logprobs.__getitem__)
        total += scores.logprobs[surest]
        del masked[surest]
    return total


def is_greedy(text: Text, mask_token_id: int) -> Estimate[bool]:
    """Whether the model, filling the surest place of so many masks in each pass, gives the answer.

    Ends with the first token that is another.
    """
    masked = list(range(len(text.answer)))
    while masked:
        (scores,) = yield [text.masked(masked, mask_token_id)]
        surest = max(range(len(masked)), key=scores.best_logprobs.__getitem__)
        if scores.best[surest] != text.answer[masked[surest]]:
            return False
        del masked[surest]
    return True


def run(
    estimates: Sequence[Estimate[Result]], score: Callable[[list[Pass]], list[Scores]]
) -> list[Result]:
    """The estimates' results. Passes that they wait for at the same time are scored together."""
    results: dict[int, Result] = {}
    sent: dict[int, list[Scores] | None] = dict.fromkeys(range(len(estimates)))
    while sent:
        asked: dict[int, list[Pass]] = {}
        for i, scores in sent.items():
            try:
                asked[i] = estimates[i].send(scores)
            except StopIteration as end:
                results[i] = end.value
        found = iter(score([one for passes in asked.values() for one in passes]))
        sent = {i: [next(found) for _ in passes] for i, passes in asked.items()}
    return [results[i] for i in range(len(estimates))]
