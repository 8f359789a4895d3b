# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Log probabilities of tokens, against their definition in float64."""

import pytest
import torch

from sparsed_vllm.logprobs import LogprobRecord, score_tokens

MASK = 7


@pytest.fixture
def logits():
    return torch.randn(20, 50) * 3


def test_scores_are_those_of_the_softmax_over_all_tokens(logits):
    tokens = torch.randint(8, 50, (20,))
    scores = score_tokens(logits, tokens, 4, MASK)
    expected = logits.double().log_softmax(-1).gather(-1, scores.token_ids.long())
    torch.testing.assert_close(scores.logprobs.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(scores.token_ids[:, 0].long(), tokens)


def test_alternatives_are_the_likeliest_but_for_the_mask(logits):
    logits[:, MASK] = 100.0
    scores = score_tokens(logits, torch.zeros(20, dtype=torch.int64), 3, MASK)
    logits[:, MASK] = -torch.inf
    assert torch.equal(scores.token_ids[:, 1:].long(), logits.topk(3).indices)
    assert torch.equal(scores.ranks, 1 + (logits > logits[:, :1]).sum(-1).int())


def test_no_alternatives_may_be_asked_for(logits):
    scores = score_tokens(logits, logits.argmax(-1), 0, MASK)
    assert scores.token_ids.shape == (20, 1)


def test_narrow_logits_are_scored_in_float32(logits):
    narrow, tokens = logits.bfloat16(), logits.argmax(-1)
    got, want = (score_tokens(some, tokens, 2, MASK) for some in (narrow, narrow.float()))
    assert torch.equal(got.logprobs, want.logprobs)


def test_a_record_holds_what_was_filled_and_no_padding(logits):
    record = LogprobRecord(6, 1, logits.device)
    tokens = logits.argmax(-1)
    places = torch.tensor([1, 2, 4, 5, -1])
    chosen = torch.tensor([1, 0, 0, 1, 0], dtype=torch.bool)
    scores = score_tokens(logits[:5], tokens[:5], 1, MASK)
    record.note(scores, places, chosen)
    got = record.of(torch.arange(6))
    assert torch.equal(got.logprobs[[1, 5]], scores.logprobs[[0, 3]])
    assert torch.equal(got.token_ids[[1, 5]], scores.token_ids[[0, 3]])
    assert not got.logprobs[[0, 2, 3, 4]].any()
