# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Log probabilities of a request's tokens, each as the step that filled its place saw it."""

from dataclasses import dataclass

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = 1 << 25  # rows x vocabulary widened together: 128 MiB in float32


@dataclass(frozen=True)
class TokenScores:
    """What the model thought of the tokens of some places, and of their likeliest alternatives.

    token_ids int32 [places, 1 + top]: the place's own token, then the likeliest, best first
    logprobs float32 [places, 1 + top]: of those, in the softmax over all tokens
    ranks int32 [places]: how many tokens were at least as likely as the place's own, itself counted
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor


def score_tokens(logits: Tensor, tokens: Tensor, top: int, mask_token_id: int) -> TokenScores:
    """Scores of `tokens` int64 [rows] by `logits` [rows, vocab], any float type.

    The mask token is no alternative and has no rank, but counts in the softmax.
    """
    own = tokens[:, None]
    logprobs = logits.float().log_softmax(-1)
    own_logprobs = logprobs.gather(-1, own)
    logprobs[:, mask_token_id] = float("-inf")
    best = logprobs.topk(top, dim=-1)
    return TokenScores(
        torch.cat([own, best.indices], -1).int(),
        torch.cat([own_logprobs, best.values], -1),
        (logprobs >= own_logprobs).sum(-1).int(),
    )


def rows_at_once(vocab_size: int) -> int:
    """Rows of logits that are scored together; bounds the memory."""
    return max(1, _ELEMENTS_AT_ONCE // vocab_size)


class LogprobRecord:
    """One request's scores, place by place, on the device; written as its places are filled."""

    def __init__(self, num_tokens: int, top: int, mask_token_id: int, device: torch.device) -> None:
        self.top = top
        self.mask_token_id = mask_token_id
        # The place past the end takes what is written for padding.
        shape = (num_tokens + 1, 1 + top)
        self._scores = TokenScores(
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, device=device),
            torch.zeros(shape[:1], dtype=torch.int32, device=device),
        )

    def note(self, logits: Tensor, places: Tensor, tokens: Tensor, rows: Tensor) -> None:
        """Record the scores of the places that a step has filled.

        logits [n, vocab], places and tokens int64 [n]: of the places that were open
        rows int64 [any]: those of them that were filled, -1 for padding
        """
        for part in rows.split(rows_at_once(logits.shape[-1])):
            self._note(logits, places, tokens, part)

    def _note(self, logits: Tensor, places: Tensor, tokens: Tensor, rows: Tensor) -> None:
        some = rows.clamp(min=0)
        scores = score_tokens(logits[some], tokens[some], self.top, self.mask_token_id)
        places = torch.where(rows >= 0, places[some], len(self._scores.ranks) - 1)
        self._scores.token_ids[places] = scores.token_ids
        self._scores.logprobs[places] = scores.logprobs
        self._scores.ranks[places] = scores.ranks

    def of(self, places: Tensor) -> TokenScores:
        """The scores of `places` int64 [n]."""
        every = self._scores
        return TokenScores(every.token_ids[places], every.logprobs[places], every.ranks[places])
