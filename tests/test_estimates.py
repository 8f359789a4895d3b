# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Estimates of an answer's likelihood, over a model small enough for their exact values."""

import math
import random
from collections import Counter
from itertools import combinations
from statistics import fmean, stdev

import estimates
import pytest
from estimates import Scores, Text

MASK = -1
TEXT = Text((4, 4), (0, 1, 2), (5,))


def logprob(token_ids, place, token):
    """Of a model with three tokens, that looks at everything and at where it stands."""
    seen = sum((i + 2) * (x + 3) for i, x in enumerate(token_ids)) + 7 * place
    logits = [math.sin(seen + other) for other in range(3)]
    return logits[token] - math.log(sum(map(math.exp, logits)))


def score(passes):
    found = []
    for one in passes:
        rows = [[logprob(one.token_ids, place, t) for t in range(3)] for place in one.places]
        own = [row[token] for row, token in zip(rows, one.tokens, strict=True)]
        found.append(Scores(own, [row.index(max(row)) for row in rows], [max(row) for row in rows]))
    return found


def exact(text):
    """What LLaDA's estimate estimates: all masks of k of l tokens at 1 / l together, each l / k."""
    length = len(text.answer)
    subsets = [s for k in range(1, length + 1) for s in combinations(range(length), k)]
    scores = score([text.masked(subset, MASK) for subset in subsets])
    sizes = [len(subset) for subset in subsets]
    return sum(
        sum(one.logprobs) / size / math.comb(length, size)
        for one, size in zip(scores, sizes, strict=True)
    )


def estimate(text, samples, seed):
    (found,) = estimates.run([estimates.monte_carlo(text, MASK, samples, seed)], score)
    return found


def test_the_estimate_s_mean_is_the_exact_value():
    """Also of few samples, whose numbers of masks are not spread evenly by themselves."""
    for samples in (1, 2, 7):
        found = [estimate(TEXT, samples, seed) for seed in range(2000)]
        assert abs(fmean(found) - exact(TEXT)) < 4 * stdev(found) / math.sqrt(len(found))


def test_one_token_needs_one_pass_whatever_the_samples():
    text = Text((4, 4), (2,))
    expected = logprob((4, 4, MASK), 2, 2)
    for samples in (1, 128):
        asked = estimates.monte_carlo(text, MASK, samples)
        assert len(next(asked)) == 1
        assert estimate(text, samples, seed=3) == pytest.approx(expected, rel=1e-12)


def test_every_number_of_masks_is_as_likely_as_any_other():
    class Offset(random.Random):
        def randrange(self, stop):
            return self.offset

    rng, length, samples = Offset(0), 6, 4
    counts = [Counter() for _ in range(samples)]
    for rng.offset in range(length):
        for count, places in zip(counts, estimates.draw_masks(length, samples, rng), strict=True):
            assert len(set(places)) == len(places)
            count[len(places)] += 1
    assert counts == [Counter(range(1, length + 1))] * samples


def test_dream_s_published_masks_estimate_the_same():
    """It masks each token with probability t and divides by t, for t uniform in (0, 1)."""
    length, steps = 5, 20000
    for masked in range(1, length + 1):
        times = ((step + 0.5) / steps for step in range(steps))
        weight = fmean(t ** (masked - 1) * (1 - t) ** (length - masked) for t in times)
        assert weight == pytest.approx(1 / masked / math.comb(length, masked), rel=1e-6)


def test_masks_depend_on_the_text_and_the_seed_alone():
    def masks(text, seed=0):
        return next(estimates.monte_carlo(text, MASK, 8, seed))

    other = TEXT._replace(answer=(2, 1, 0))
    assert masks(TEXT) == masks(TEXT)
    assert masks(TEXT) != masks(TEXT, seed=1)
    places = [[one.places for one in masks(text)] for text in (TEXT, other)]
    assert places[0] != places[1]


def test_the_confidence_score_is_one_token_s_probability_after_another():
    (found,) = estimates.run([estimates.confidence(TEXT, MASK)], score)
    masked, total = [0, 1, 2], 0.0
    while masked:
        (scores,) = score([TEXT.masked(masked, MASK)])
        best = max(scores.logprobs)
        total += best
        del masked[scores.logprobs.index(best)]
    assert found == pytest.approx(total, rel=1e-12)


def test_passes_of_many_estimates_are_scored_together():
    calls = []

    def counted(passes):
        calls.append(len(passes))
        return score(passes)

    texts = [Text((4,), answer) for answer in ((0,), (1, 2, 0), (2, 2))]
    together = estimates.run([estimates.confidence(text, MASK) for text in texts], counted)
    assert calls == [3, 2, 1, 0]
    alone = [estimates.run([estimates.confidence(text, MASK)], score)[0] for text in texts]
    assert together == alone
    assert estimates.run([], score) == []
