# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Scores of given answers (examples/lm_eval) through an engine's network, against the oracle's."""

import importlib
import json
import random
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import estimates
import oracle
import passes
import pytest
import torch
from checkpoints import DREAM_MASK_ID, LLADA_MASK_ID
from estimates import Text
from passes import PassScorer
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.engine

EOS = (255,)
TEXTS = [
    Text((3, 1, 4, 1, 5), (9, 2, 6, 5, 3)),
    Text((3, 1, 4, 1, 5), (9, 2)),
    Text(tuple(7 * i % 256 for i in range(130)), (11, 12, 13), EOS),
    Text((200,), (7,), EOS),
]
SAMPLES = 16
QUESTIONS = Path(estimates.__file__).with_name("needle_choices.jsonl")


@pytest.fixture(params=["llada", "dream"])
def family(request):
    """An engine, its mask, and the logits of each place [L, vocab] by the oracle."""
    llm, path = (request.getfixturevalue(name) for name in (request.param, f"{request.param}_path"))
    if request.param == "llada":
        return llm, LLADA_MASK_ID, oracle.load_llada(path)
    return llm, DREAM_MASK_ID, oracle.shifted(oracle.load_dream(path))


def losses(rows, text, masked, mask_id, cfg=0.0):
    """[masked places] cross entropy of the answer's tokens there, as the authors' code has it."""
    ids = torch.tensor([[*text.prompt, *text.answer, *text.suffix]])
    places = torch.tensor(sorted(masked)) + len(text.prompt)
    noisy = ids.clone()
    noisy[0, places] = mask_id
    logits = rows(noisy)[0]
    if cfg:
        noisy[0, : len(text.prompt)] = mask_id
        without = rows(noisy)[0]
        logits = without + (cfg + 1) * (logits - without)
    return cross_entropy(logits[places], ids[0, places], reduction="none")


def published_estimate(rows, text, mask_id, seed, cfg=0.0):
    """get_log_likelihood() with the masks that the script draws, a pass a sample."""
    length = len(text.answer)
    total = 0.0
    drawn = estimates.draw_masks(length, SAMPLES, random.Random(repr((seed, text))))
    for masked in drawn:
        total += float((losses(rows, text, masked, mask_id, cfg) / (len(masked) / length)).sum())
    return -total / SAMPLES


@pytest.mark.parametrize("cfg", [0.0, 0.5])
def test_the_estimate_is_that_of_the_published_loop_with_the_same_masks(family, cfg):
    llm, mask_id, rows = family
    asked = [estimates.monte_carlo(text, mask_id, SAMPLES, seed=5) for text in TEXTS]
    got = estimates.run(asked, PassScorer(llm, cfg))
    expected = [published_estimate(rows, text, mask_id, 5, cfg) for text in TEXTS]
    assert got == pytest.approx(expected, rel=1e-5)


def test_the_confidence_score_shows_the_likeliest_token_first(family):
    llm, mask_id, rows = family
    got = estimates.run([estimates.confidence(t, mask_id) for t in TEXTS], PassScorer(llm))
    for text, score in zip(TEXTS, got, strict=True):
        masked, total = list(range(len(text.answer))), 0.0
        while masked:
            loss, index = losses(rows, text, masked, mask_id).min(dim=-1)
            total -= float(loss)
            del masked[int(index)]
        assert score == pytest.approx(total, rel=1e-5)


def test_greedy_is_what_the_surest_places_give(family):
    """suffix_greedy_prediction(): the answer that it fills is greedy, and no other is."""
    llm, mask_id, rows = family
    prompt, filled = [3, 1, 4, 1, 5], [mask_id] * 4
    while mask_id in filled:
        masked = [i for i, token in enumerate(filled) if token == mask_id]
        logits = rows(torch.tensor([prompt + filled]))[0, len(prompt) :][masked]
        sure, tokens = logits.softmax(dim=-1).max(dim=-1)
        assert int(tokens[sure.argmax()]) != mask_id, "choose another prompt"
        filled[masked[int(sure.argmax())]] = int(tokens[sure.argmax()])
    answers = [filled, [*filled[:3], (filled[3] + 1) % 256]]
    texts = [Text(tuple(prompt), tuple(answer)) for answer in answers]
    asked = [estimates.is_greedy(text, mask_id) for text in texts]
    assert estimates.run(asked, PassScorer(llm)) == [True, False]


def test_answers_of_one_token_to_one_question_share_a_pass(llada, monkeypatch):
    seen = []
    run_model = passes.run_model
    monkeypatch.setattr(
        passes, "run_model", lambda model, texts: seen.extend(texts) or run_model(model, texts)
    )
    texts = [Text((3, 1, 4), (letter,)) for letter in (65, 66, 67, 68)]
    asked = [estimates.monte_carlo(text, LLADA_MASK_ID, 128) for text in texts]
    scores = estimates.run(asked, PassScorer(llada))
    assert seen == [(3, 1, 4, LLADA_MASK_ID)]
    assert len(set(scores)) == 4


def test_a_batch_holds_no_more_tokens_than_the_engine_takes_at_once(llada, monkeypatch):
    texts = [Text((1,) * n, (2, 3)) for n in (30, 40, 25, 90, 5)]
    asked = [estimates.confidence(text, LLADA_MASK_ID) for text in texts]
    together = estimates.run(asked, PassScorer(llada))
    scorer, sizes, run_model = PassScorer(llada), [], passes.run_model
    scorer.most_tokens = 80
    monkeypatch.setattr(
        passes,
        "run_model",
        lambda model, texts: sizes.append(list(map(len, texts))) or run_model(model, texts),
    )
    asked = [estimates.confidence(text, LLADA_MASK_ID) for text in texts]
    assert estimates.run(asked, scorer) == pytest.approx(together, rel=1e-5)
    assert sizes[:4] == [[32, 42], [27], [92], [7]]


@pytest.fixture(scope="module")
def likelihood():
    """The script; where lm-eval is not installed, on a stand-in for it."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            import lm_eval.api.model  # noqa: F401 (examples/lm_eval alone is an lm_eval too)
        except ImportError:
            for name, members in LM_EVAL.items():
                patch.setitem(sys.modules, name, module(name, members))
        yield importlib.import_module("likelihood")


@pytest.fixture
def lm(likelihood, needle, monkeypatch):
    """Makes the script's model over the small trained one."""
    monkeypatch.setattr(likelihood, "LLM", lambda path, **engine: needle)
    return partial(likelihood.Likelihoods, "needle")


def module(name, members):
    made = ModuleType(name)
    vars(made).update(members, __path__=[])
    return made


class Base:
    """What the script takes from lm-eval's TemplateLM."""

    def __init__(self):
        self.cache_hook = SimpleNamespace(add_partial=lambda *args: None)


LM_EVAL = {
    "lm_eval": {},
    "lm_eval.__main__": {"cli_evaluate": None},
    "lm_eval.api": {},
    "lm_eval.api.model": {"TemplateLM": Base},
    "lm_eval.api.registry": {"register_model": lambda name: lambda model: model},
}


@pytest.mark.parametrize(
    "options", [{"llh": "confidence"}, {"mc_num": 4}], ids=["confidence", "mc"]
)
def test_the_small_model_chooses_the_right_answers(lm, options):
    model, requests, kept = lm(**options, is_check_greedy=True), [], {}
    model.cache_hook.add_partial = lambda kind, request, result: kept.update({request: result})
    questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    questions = [q for q in questions if q["task"] in ("single", "common")][1::2]
    for question in questions:
        chat = [{"role": "user", "content": question["text"]}]
        prompt = model.apply_chat_template(chat)
        encoded = model.tok_encode(prompt, add_special_tokens=False)
        for answer in question["choices"]:
            ids = model.tok_encode(answer, add_special_tokens=False)
            requests.append(((prompt, answer), encoded, ids))
    results = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert kept == {texts: result for (texts, *_), result in zip(requests, results, strict=True)}
    for i, question in enumerate(questions):
        scores, greedy = zip(*results[4 * i : 4 * i + 4], strict=True)
        assert scores.index(max(scores)) == question["label"]
        assert [j for j in range(4) if greedy[j]] == [question["label"]]


def test_bos_is_shown_once_and_eos_behind_the_answer(lm):
    model = lm(add_bos_token=True, padd_eos=True)
    bos, eos = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    plain = model.tok_encode("what is the number", add_special_tokens=False)
    assert model.tok_encode("what is the number") == [bos, *plain]
    assert model.tok_encode(model.tokenizer.bos_token + "what is the number") == [bos, *plain]
    assert model._text([7], [8, 9]) == Text((7,), (8, 9), (eos,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llh": "sum"}, "llh must be mc or confidence, got 'sum'"),
        ({"mc_num": 0}, "mc_num must be a whole number of at least 1, got 0"),
        ({"cfg": -1}, "cfg must be a number of at least 0, got -1"),
        ({"batch_size": 8}, "--batch_size must be 1"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_engine_starts(lm, options, message):
    with pytest.raises(ValueError, match=message):
        lm(**options)


@pytest.mark.parametrize(("prompt", "answer"), [([1] * 2048, [2]), ([1], [])])
def test_a_text_that_is_too_long_or_an_empty_answer_is_refused(lm, prompt, answer):
    with pytest.raises(ValueError, match="must have 1 to 2048 tokens"):
        lm()._text(prompt, answer)
