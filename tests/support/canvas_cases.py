# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Random canvases, and steps of batches of them."""

from dataclasses import dataclass, fields

import numpy as np
import torch

from sparsed_vllm.kernels import canvas as c
from sparsed_vllm.kernels.canvas import CanvasState, OpenRows, StepColumns

NAN, INF = float("nan"), float("inf")


@dataclass
class CanvasCase:
    """Canvases, a step of some of them, and what was chosen for its rows; all on the CPU.

    confidence, largest float32 [num_rows];  uniform float64 [num_rows];  tokens int64 [num_rows]
    """

    state: CanvasState
    host: np.ndarray
    tokens: torch.Tensor
    confidence: torch.Tensor
    largest: torch.Tensor
    uniform: torch.Tensor

    @property
    def slots(self):
        return self.host[c.SLOT].astype(int)

    def on(self, device):
        """The canvases, of which nobody else has these tensors, and the columns."""
        own = (getattr(self.state, field.name) for field in fields(CanvasState))
        columns = StepColumns(self.host, torch.from_numpy(self.host.copy()).to(device))
        return CanvasState(*(x.clone().to(device) for x in own)), columns

    def results(self, device):
        """Of the rows, on a device."""
        return tuple(x.to(device) for x in (self.tokens, self.confidence, self.largest))


def make_case(seed, num_reqs=7, longest=700, block_lengths=(1, 7, 64, 300, 700), **columns):
    """Canvases in any state; columns: values that all requests have instead of random ones."""
    draw = np.random.default_rng(seed)
    num_slots = num_reqs + 4
    state = random_state(draw, num_slots, longest)
    host = np.zeros((c.NUM_COLUMNS, num_reqs))
    host[c.SLOT] = draw.permutation(num_slots)[:num_reqs]
    lengths = draw.choice(block_lengths, num_reqs)
    num_tokens = draw.integers(1, longest + 1, num_reqs)
    for slot, count in zip(host[c.SLOT].astype(int), num_tokens, strict=True):
        state.masked[slot] = random_mask(draw, count, longest)
        state.num_taken[slot] = int(draw.integers(0, count + 1))
    chance = draw.random
    policies = {
        c.NUM_TOKENS: num_tokens,
        c.BLOCK_LENGTH: lengths,
        c.END: np.where(chance(num_reqs) < 0.7, num_tokens, draw.integers(1, longest, num_reqs)),
        c.BLOCK_STEP: np.where(chance(num_reqs) < 0.5, -1, draw.integers(0, 9, num_reqs)),
        c.NUM_FILLED: draw.choice([0, 1, 3, 40, 900], num_reqs),
        c.THRESHOLD: np.where(chance(num_reqs) < 0.5, INF, chance(num_reqs)),
        c.SHARE: np.where(chance(num_reqs) < 0.5, 0, draw.choice([chance(), 1.0], num_reqs)),
        c.ALG_TEMP: draw.choice([0, 0, 1e-300, 0.3, 50.0], num_reqs),
        c.BY_CHANCE: chance(num_reqs) < 0.3,
        c.MAY_HAND_OUT: chance(num_reqs) < 0.7,
        c.EARLY_STOP: chance(num_reqs) < 0.6,
        c.IS_LAST: chance(num_reqs) < 0.3,
        c.FIRST_PLACE: np.where(chance(num_reqs) < 0.5, 0, draw.integers(0, num_tokens)),
        c.NUM_OPEN: draw.choice([0, 1, 2, 63, 64, 65, 150, 300], num_reqs),
        c.READ_ROW: draw.integers(-1, 90, num_reqs),
        c.WINDOW_ROW: draw.integers(0, 90, num_reqs),
    }
    for column, values in policies.items():
        host[column] = values
    for name, value in columns.items():
        host[getattr(c, name)] = value
    host[c.NUM_SEEN] = host[c.NUM_TOKENS]
    if "NUM_TOKENS" not in columns:  # some have yet to grow
        grown = np.maximum(host[c.FIRST_PLACE] + 1, num_tokens // 2)
        host[c.NUM_SEEN, ::2] = grown[::2]
    host[c.CANVAS_ROW] = np.cumsum(host[c.NUM_TOKENS]) - host[c.NUM_TOKENS]
    order = draw.permutation(num_reqs)
    host[c.ROW_START, order] = np.cumsum(host[c.NUM_OPEN, order]) - host[c.NUM_OPEN, order]
    return CanvasCase(state, host, *random_results(draw, int(host[c.NUM_OPEN].sum())))


def random_state(draw, num_slots, longest):
    shape = (num_slots + 1, longest)
    seeds = draw.integers(-(1 << 63), 1 << 63, num_slots, dtype=np.int64)
    return CanvasState(
        torch.from_numpy(draw.integers(0, 1000, shape).astype(np.int32)),
        torch.from_numpy(draw.random(shape) < 0.5),
        torch.zeros(num_slots, dtype=torch.int64),
        torch.from_numpy(draw.integers(0, 50, num_slots)),
        torch.from_numpy(seeds),
        torch.from_numpy(draw.random(num_slots) < 0.2),
    )


def random_mask(draw, num_tokens, longest):
    """A canvas that is filled up to some place, behind it here and there; or filled, or empty."""
    first = draw.choice([0, num_tokens, draw.integers(0, num_tokens)])
    places = np.arange(longest)
    mask = (places >= first) & (draw.random(longest) < draw.choice([0.3, 1.0]))
    return torch.from_numpy(mask & (places < num_tokens))


def random_results(draw, num_rows):
    """Tokens, confidences with ties, zeros of both signs and no numbers, largest logits, chance."""
    tokens = torch.from_numpy(draw.integers(0, 1000, num_rows))
    values = np.array([0.0, -0.0, 0.25, 0.5, 1.0, -1.5, NAN, -INF])
    tied = draw.choice(values, num_rows, p=[0.2, 0.2, 0.2, 0.2, 0.1, 0.05, 0.03, 0.02])
    mixed = np.where(draw.random(num_rows) < 0.5, tied, draw.random(num_rows))
    largest = draw.choice([3.0, NAN, INF, -INF], num_rows, p=[0.997, 0.001, 0.001, 0.001])
    confidence, largest = (torch.from_numpy(x.astype(np.float32)) for x in (mixed, largest))
    return tokens, confidence, largest, torch.from_numpy(draw.uniform(1e-12, 1, num_rows))


def rows_of(case, open_canvases, device="cpu"):
    """The rows of its step."""
    rows = open_canvases(*case.on(device))
    return OpenRows(*(x.to(device) for x in rows))
