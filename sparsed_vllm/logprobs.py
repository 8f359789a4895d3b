# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Log probabilities of a request's tokens, each as the step that filled its place saw it."""

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def of(self, places: Tensor | slice) -> "TokenScores":
        """Those of some of the places."""
        return TokenScores(self.token_ids[places], self.logprobs[places], self.ranks[places])


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


class LogprobRecord:
    """One request's scores, place by place, on the device; written as its places are filled."""

    def __init__(self, num_tokens: int, top: int, device: torch.device) -> None:
        # The place past the end takes what is written for padding.
        shape = (num_tokens + 1, 1 + top)
        self._scores = TokenScores(
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, device=device),
            torch.zeros(shape[:1], dtype=torch.int32, device=device),
        )

    def note(self, scores: TokenScores, places: Tensor, chosen: Tensor) -> None:
        """Keep the scores of the places that a step has filled.

        scores, places int64, chosen bool [n]: of the places that were open, and which were filled
        """
        kept = self._scores
        places = torch.where(chosen, places, len(kept.ranks) - 1)
        kept.token_ids[places] = scores.token_ids
        kept.logprobs[places] = scores.logprobs
        kept.ranks[places] = scores.ranks

    def of(self, places: Tensor) -> TokenScores:
        """The scores of `places` int64 [n]."""
        return self._scores.of(places)
