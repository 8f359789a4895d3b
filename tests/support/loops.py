# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The denoising of one request without an engine: plan, canvas and sampler, on any logits."""

from types import SimpleNamespace

import numpy as np
import torch

from sparsed_vllm.batch import DenoisingBatch, DenoisingRequest
from sparsed_vllm.canvases import Canvases, CanvasPlaces, NewCanvas
from sparsed_vllm.sampler import DenoisingSampler
from sparsed_vllm.steps import Plan


class Loop:
    """A request that is alone in slot `slot` of several.

    final: tokens that were handed out before, as after a preemption
    """

    def __init__(
        self, params, *, sparsity=None, prompt_len=5, final=(), mask=0, seed=0, slot=1, device="cpu"
    ):
        self.request = DenoisingRequest(slot, Plan(params, sparsity, prompt_len), len(final))
        self.canvases = Canvases(slot + 2, params.num_tokens + 3, torch.device(device))
        num_filled = len(final) if self.request.cursor.step else 0
        new = NewCanvas(slot, params.num_tokens, seed, len(final), num_filled, final)
        self.canvases.add([new])
        state = SimpleNamespace(
            canvases=self.canvases,
            model=SimpleNamespace(score=lambda logits: logits),
            mask_token_id=mask,
            vocab_size=320,
            max_num_tokens=1 << 20,
            logprobs={},
        )
        self.sampler = DenoisingSampler(state, compute_nans=False)
        self.mask = mask
        self.batch = None

    @property
    def plan(self):
        return self.request.plan

    @property
    def is_over(self):
        return not self.request.cursor.steps_left

    @property
    def tokens(self):
        """What the model sees of the canvas, int64 [num_tokens], less where it has to grow."""
        batch = self._open()
        length = batch.steps[0].length
        ids = torch.zeros(length, dtype=torch.int32, device=self.canvases.device)
        self.canvases.write_ids(batch.canvas, ids, self.mask)
        return ids[self.plan.prompt_len :].long()

    def _open(self):
        """The coming step; the last again when it is over."""
        step = self.plan.at(min(self.request.cursor.step, self.plan.num_steps - 1))
        slots, params = [self.request.slot], [self.plan.params]
        canvas = self.canvases.open(slots, params, [step], [0], self._places())
        starts = np.array([0, self.plan.length], np.int32)
        return DenoisingBatch(["0"], [self.request], [step], starts, canvas)

    def _places(self):
        """Where its canvas lies: behind the prompt."""
        first, rows = np.array([[0], [self.plan.prompt_len]])
        return CanvasPlaces(first, rows, rows, first)

    def open(self):
        """Begin the next step; returns the places whose logits it reads, int64 [n], -1 padded."""
        self.batch = self._open()
        return self.batch.canvas.places

    def advance(self, logits):
        """Run it; returns the tokens that became final, padded, and how many they are."""
        self.request.cursor.advance()
        if len(logits):
            self.sampler._advance(logits, self.batch)
        taken = self.canvases.take(self.batch.canvas)
        return taken.tokens[0], taken.counts[0]
