# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Of a step's time, the shares that parts of the model and of the engine take.

From a trace of torch's profiler: what a kernel is for is told by the part of the engine that
launched it and, within the model, by its name.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch.cuda import Event as Mark
from torch.profiler import ProfilerActivity, profile, record_function
from vllm import LLM

from generation.machine import wait
from generation.steps import Load, time_step
from sparsed_vllm.sampler import DenoisingSampler

KINDS = {  # of the model's kernels, by a part of their names; the first that fits counts
    "attention": ("attention", "flash", "block_scores", "prompt_scores", "select_blocks"),
    "linears": ("gemm", "cutlass", "nvjet", "cublas", "wgmma"),
}
OTHER = "norm, rotary, activation"
MODEL = (*KINDS, OTHER, "head")  # all else is overhead
ENGINE = "inputs"  # kernels that no named part launched

Event = dict[str, Any]


def profile_phases(llm: LLM, load: Load) -> dict[str, dict[str, float]]:
    """For one step of each phase, shares of the time that it takes under the profiler.

    The profiler slows the host, so what waits for the host, `idle`, is at most so much. `outside`
    comes from steps that nobody traces; see outside_model.
    """
    outside = {phase: share for phase, (_, share) in outside_model(llm, load).items()}
    load.add(llm, load.short, sparse=True)
    found: dict[str, dict[str, float]] = {}
    for step in range(load.short):
        phase = load.phase_at(step)
        if phase in found or step == 0:
            time_step(llm)
        else:
            events, seconds = trace_step(llm)
            found[phase] = {**shares(events, seconds), "outside": round(outside[phase], 5)}
    return found


def outside_model(llm: LLM, load: Load) -> dict[str, tuple[float, float]]:
    """By phase, medians of what the device itself measures, without a profiler.

    Seconds from one step's beginning of the model to the next one's, and the share of them that
    lies after the head: choosing tokens, the next step's inputs, and waiting. The host's work
    counts as far as the device waits for it, so with async scheduling hardly.
    """
    marks: list[tuple[Mark, Mark]] = []
    with marked_steps(llm, marks):
        load.add(llm, load.short, sparse=True)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    wait()
    found = defaultdict(list)
    for step, ((begin, end), (following, _)) in enumerate(pairwise(marks)):
        millis = begin.elapsed_time(following)
        share = 1 - begin.elapsed_time(end) / millis
        found[load.phase_at(step)].append((millis / 1e3, share))
    return {
        phase: (median(seconds for seconds, _ in pairs), median(share for _, share in pairs))
        for phase, pairs in found.items()
    }


@contextmanager
def marked_steps(llm: LLM, marks: list[tuple[Mark, Mark]]) -> Iterator[None]:
    """Each step notes on the device when its model begins, and when its head has ended."""
    (model,) = llm.apply_model(lambda model: model)
    forward, compute_logits = model.forward, model.compute_logits

    def begin(*args: Any, **kwargs: Any) -> Any:
        marks.append((Mark(True), Mark(True)))
        marks[-1][0].record()
        return forward(*args, **kwargs)

    def end(*args: Any, **kwargs: Any) -> Any:
        logits = compute_logits(*args, **kwargs)
        marks[-1][1].record()
        return logits

    with patch.object(model, "forward", begin), patch.object(model, "compute_logits", end):
        yield


def trace_step(llm: LLM) -> tuple[list[Event], float]:
    """One step, as events of a Chrome trace, and its seconds."""
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] * torch.cuda.is_available()
    wait()
    with named_parts(llm), profile(activities=activities) as trace:
        seconds = time_step(llm)
        wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"], seconds


@contextmanager
def named_parts(llm: LLM) -> Iterator[None]:
    """The parts of a step get names that a trace shows."""
    core = llm.llm_engine.engine_core.engine_core
    (model,) = llm.apply_model(lambda model: model)
    parts = [
        (model, "forward", "model"),
        (model, "compute_logits", "head"),
        (DenoisingSampler, "__call__", "sampler"),
        (core.scheduler, "schedule", "scheduler"),
        (core.scheduler, "update_from_output", "scheduler"),
    ]
    with ExitStack() as stack:
        for owner, method, name in parts:
            call = named(name, getattr(owner, method))
            stack.enter_context(patch.object(owner, method, call))
        yield


def named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return call(*args, **kwargs)

    return run


def shares(events: list[Event], seconds: float) -> dict[str, float]:
    """Shares of `seconds` by kind; `idle`: no kernel runs, nor the scheduler.

    `overhead`: all that is not the model's kernels; part of what stands beside it
    """
    taken = {kind: micros / 1e6 / seconds for kind, micros in micros_of(events).items()}
    idle = max(0.0, 1.0 - sum(taken.values()))
    overhead = max(0.0, 1.0 - sum(taken.get(kind, 0.0) for kind in MODEL))
    rounded = {**taken, "idle": idle, "overhead": overhead}
    return {kind: round(share, 5) for kind, share in rounded.items()}


def micros_of(events: list[Event]) -> dict[str, float]:
    """Microseconds of kernels on the device by kind, and of the scheduler on the host."""
    events = [event for event in events if event.get("ph") == "X"]
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
    }
    parts = [event for event in events if event.get("cat") == "user_annotation"]
    micros: dict[str, float] = defaultdict(float)
    for event in parts:
        if event["name"] == "scheduler":
            micros["scheduler"] += event["dur"]
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            part = part_at(parts, launches.get(event["args"].get("correlation")))
            micros[kind_of(part, event["name"])] += event["dur"]
    return dict(micros)


def part_at(parts: list[Event], time: float | None) -> str:
    """The named part of the engine that ran on the host then."""
    for event in parts:
        named = event["name"] in ("model", "head", "sampler")
        if named and time is not None and event["ts"] <= time <= event["ts"] + event["dur"]:
            return str(event["name"])
    return ENGINE


def kind_of(part: str, kernel: str) -> str:
    if part != "model":
        return part
    name = kernel.lower()
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return OTHER
