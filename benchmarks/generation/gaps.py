# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How long the device waits between steps, without a profiler that slows the host down."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from vllm import LLM

from sparsed_vllm.sampler import DenoisingSampler

Event = Any  # torch.cuda.Event


class Gaps:
    """Each from the end of a step's sampler to the begin of the next step's model.

    What the runner launches in between, the inputs of a step, is part of them.
    """

    def __init__(self, new_event: Callable[[], Event]) -> None:
        self.new_event = new_event
        self.begins: list[Event] = []
        self.ends: list[Event] = []

    def mark(self, events: list[Event]) -> None:
        event = self.new_event()
        event.record()
        events.append(event)

    def seconds(self) -> float:
        """The median; call it when the device has done all steps."""
        pairs = zip(self.ends, self.begins[1:], strict=False)
        return statistics.median(end.elapsed_time(begin) for end, begin in pairs) / 1e3


@contextmanager
def watched(llm: LLM) -> Iterator[Gaps | None]:
    """None without a GPU: the host then computes itself."""
    if not torch.cuda.is_available():
        yield None
        return
    gaps = Gaps(lambda: torch.cuda.Event(enable_timing=True))
    (model,) = llm.apply_model(lambda model: model)
    forward, sample = model.forward, DenoisingSampler.__call__

    def begin(*args: Any, **kwargs: Any) -> Any:
        gaps.mark(gaps.begins)
        return forward(*args, **kwargs)

    def end(*args: Any, **kwargs: Any) -> Any:
        result = sample(*args, **kwargs)
        gaps.mark(gaps.ends)
        return result

    with patch.object(model, "forward", begin), patch.object(DenoisingSampler, "__call__", end):
        yield gaps
