# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Settings that an engine takes for an experiment only: which attention chooses, and tables.

An engine in this process is changed in place, and back at the end. Values are short words, as they
stand in a method's name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from quality.table_experiments import listing, recording
from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.layout import NUM_ROWS, QUERY_START, BatchLayout, send
from sparsed_vllm.steps import Cursor


@contextmanager
def applied(llm: Any, experiment: Sequence[tuple[str, str]]) -> Iterator[None]:
    """The engine under these settings, as long as the context lasts."""
    with ExitStack() as stack:
        for name, value in experiment:
            stack.enter_context(EXPERIMENTS[name].change(llm, value))
        yield


def check(name: str, value: str) -> None:
    """Raises ValueError where a setting has no such value."""
    if not EXPERIMENTS[name].allows(value):
        raise ValueError(f"{name} has no value {value}; {__name__} says which it has.")


@contextmanager
def choosing_layers(llm: Any, which: str) -> Iterator[None]:
    """Only these layers' attention chooses: `last2`, `first2`, `odd` or a number, from 0."""
    layers = layers_of(llm)
    before = [layer.notes_mass for layer in layers]
    chosen = _layers(which, len(layers))
    for index, layer in enumerate(layers):
        layer.notes_mass = index in chosen
    try:
        yield
    finally:
        for layer, notes in zip(layers, before, strict=True):
            layer.notes_mass = notes


def layers_of(llm: Any) -> list[Any]:
    """Their attention, the first layer's first."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    state = executor.driver_worker.worker.model_runner.model_state
    return [layer.impl for layer in state._attention_layers()]


def _layers(which: str, num_layers: int) -> set[int]:
    if which == "odd":
        return set(range(1, num_layers, 2))
    for word, end in (("last", None), ("first", 0)):
        if which.startswith(word):
            count = int(which.removeprefix(word))
            return set(range(num_layers)[-count:] if end is None else range(num_layers)[:count])
    return {int(which)}


@contextmanager
def choosing_heads(llm: Any, count: str) -> Iterator[None]:
    """Only the first so many heads of a layer choose."""

    def note(q: Tensor, keys: Tensor, lse: Tensor, *rest: Any, scale: float) -> None:
        lse = lse.clone()
        lse[int(count) :] = torch.inf  # of which the softmax is 0
        token_mass(q, keys, lse, *rest, scale=scale)

    token_mass = api.token_mass
    with patch.object(api, "token_mass", note):
        yield


@contextmanager
def choosing_rows(llm: Any, n: str) -> Iterator[None]:
    """Of the masked rows only every n-th chooses."""

    def note(
        q: Tensor,
        keys: Tensor,
        lse: Tensor,
        layout: BatchLayout,
        pages: Tensor,
        weights: Tensor,
        *rest: Any,
        scale: float,
    ) -> None:
        counts = np.zeros(len(weights), np.float32)
        for start, count in zip(*layout.host[[QUERY_START, NUM_ROWS]].tolist(), strict=True):
            counts[start : start + count : int(n)] = 1
        weights = weights * send(counts, weights.device)
        token_mass(q, keys, lse, layout, pages, weights, *rest, scale=scale)

    token_mass = api.token_mass
    with patch.object(api, "token_mass", note):
        yield


@contextmanager
def choosing_steps(llm: Any, n: str) -> Iterator[None]:
    """Only every n-th step's attention chooses, from the first on, for all steps up to the next."""

    def chooses(cursor: Cursor) -> bool:
        is_noted = (cursor.step - 1) % int(n) == 0
        return is_noted and cursor.steps_left > 0 and cursor.plan.rows_at(cursor.step)[2] > 0

    with patch.object(Cursor, "chooses_next", property(chooses)):
        yield


def _is_count(value: str) -> bool:
    return value.isdecimal() and int(value) > 0


def _names_layers(value: str) -> bool:
    count = value.removeprefix("first").removeprefix("last")
    return value == "odd" or value.isdecimal() or (count != value and _is_count(count))


class Experiment(NamedTuple):
    """change: what it changes, as long as a context lasts;  allows: the values that it has"""

    change: Callable[[Any, str], AbstractContextManager[None]]
    allows: Callable[[str], bool]


EXPERIMENTS = {
    "layers": Experiment(choosing_layers, _names_layers),
    "heads": Experiment(choosing_heads, _is_count),
    "rows": Experiment(choosing_rows, _is_count),
    "noted": Experiment(choosing_steps, _is_count),
    "recorded": Experiment(recording, {"warm"}.__contains__),
    "lists": Experiment(listing, {"own", "canvas"}.__contains__),
}
