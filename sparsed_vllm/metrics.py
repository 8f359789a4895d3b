# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The denoising's Prometheus metrics: what they are, and their way from scheduler to front end."""

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from sparsed_vllm.steps import Phase, Source
from sparsed_vllm.tally import Tally

_PAYLOAD = "sparsed"


@dataclass(frozen=True)
class Metric:
    """A counter of one number for each of its label values.

    keys: where the tally counts them: one for each label value, which follow its slashes
    """

    name: str
    documentation: str
    keys: tuple[str, ...]
    labels: tuple[str, ...] = ()


COUNTERS = (
    # As vLLM names them for its own diffusion models.
    Metric(
        "vllm:diffusion_num_denoising_steps",
        "Denoising steps, one for each request in each engine step; those that a preempted "
        "request takes again count again.",
        ("denoising_steps",),
    ),
    Metric(
        "vllm:diffusion_num_canvas_positions",
        "Places of the block that a step denoises, masked or not, over all steps.",
        ("canvas_positions",),
    ),
    Metric(
        "vllm:diffusion_num_committed_tokens",
        "Places filled for good, counted when their block is handed out; what follows EOS in it "
        "is among them. Divided by the denoising steps: tokens unmasked a step.",
        ("committed_tokens",),
    ),
    Metric(
        "vllm:sparsed_early_stops",
        "Requests that EOS or a stop token ended before their last block. (A stop string ends a "
        "request from outside, as an abort.)",
        ("early_stops",),
    ),
    Metric(
        "vllm:sparsed_steps",
        "Denoising steps by how they attend: to everything (dense), to everything while a table "
        "is recorded (recording), to the table's key blocks (sparse).",
        tuple(f"steps/{phase.value}" for phase in Phase),
        ("phase",),
    ),
    Metric(
        "vllm:sparsed_steps_by_source",
        "Denoising steps by where their keys and values come from: all from the step itself, a "
        "whole step (fresh), or most from the KV pages, a light step (pages).",
        tuple(f"steps_by_source/{source.value}" for source in Source),
        ("source",),
    ),
    Metric(
        "vllm:sparsed_computed_rows",
        "Tokens that denoising steps compute, summed over the steps.",
        ("computed_rows",),
    ),
    Metric(
        "vllm:sparsed_possible_rows",
        "Tokens that the same steps would compute if none reused keys and values.",
        ("possible_rows",),
    ),
    Metric(
        "vllm:sparsed_chosen_tokens",
        "Tokens before the current block that light steps compute because its masked places "
        "attend to them most.",
        ("chosen_tokens",),
    ),
    Metric(
        "vllm:sparsed_passes",
        "Of each step the tokens that it computes by those of its sequence, summed over the steps: "
        "1 for a whole step. Divided by the requests: how often a sequence is computed.",
        ("passes",),
    ),
    Metric(
        "vllm:sparsed_requests",
        "Requests by how they run and what decided it: their length, the request itself "
        "(use_sparsed), the attention backend, or too few steps to record a table.",
        (
            "requests/sparse/length",
            "requests/sparse/request",
            "requests/dense/length",
            "requests/dense/request",
            "requests/dense/backend",
            "requests/dense/steps",
        ),
        ("attention", "reason"),
    ),
    Metric(
        "vllm:sparsed_requests_by_reuse",
        "Requests by whether they reuse keys and values between steps.",
        ("requests_by_reuse/off", "requests_by_reuse/on"),
        ("reuse",),
    ),
    Metric("vllm:sparsed_tables", "Tables of kept key blocks recorded.", ("tables",)),
    Metric(
        "vllm:sparsed_kept_blocks",
        "Key blocks listed in recorded tables, over all layers, heads and query blocks of one "
        "tensor-parallel rank.",
        ("kept_blocks",),
    ),
    Metric(
        "vllm:sparsed_possible_blocks",
        "Key blocks that the rows of the recorded tables could have listed. Kept by possible "
        "blocks is the density.",
        ("possible_blocks",),
    ),
)
TABLE_BYTES = Metric(
    "vllm:sparsed_table_bytes",
    "Memory that the tables of running requests take on each tensor-parallel rank, in bytes.",
    ("table_bytes",),
)


def report(tally: Tally, table_bytes: int, stats: SchedulerStats) -> None:
    """Put what was counted since the last report into what the engine sends its front end.

    SchedulerStats has one field that takes any data: that of KV connectors, which our engines
    refuse. DenoisingMetrics takes it out before others look.
    """
    assert stats.kv_connector_stats is None, "KV transfer is refused"
    stats.kv_connector_stats = {_PAYLOAD: {**tally.take(), "table_bytes": table_bytes}}


class DenoisingMetrics(AggregateStatLoggerBase):
    """Registers the metrics in the front end, for each engine behind it, and counts them up.

    Made after vLLM's own logger, which clears the registry, and asked before it.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        model = vllm_config.model_config.served_model_name
        engines = {index: (model, str(index)) for index in engine_indexes}
        self._counters = _children(COUNTERS, engines, Counter)
        self._gauges = _children((TABLE_BYTES,), engines, Gauge, multiprocess_mode="mostrecent")

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is None or scheduler_stats.kv_connector_stats is None:
            return
        counts = scheduler_stats.kv_connector_stats.pop(_PAYLOAD, {})
        scheduler_stats.kv_connector_stats = scheduler_stats.kv_connector_stats or None
        for key, count in counts.items():
            if counter := self._counters.get((engine_idx, key)):
                counter.inc(count)
            else:
                self._gauges[engine_idx, key].set(count)

    def log_engine_initialized(self) -> None:
        """There is nothing to say that a metric does not."""


def _children(
    metrics: tuple[Metric, ...], engines: dict[int, tuple[str, str]], kind: Any, **options: Any
) -> dict[tuple[int, str], Any]:
    """The registered number behind each engine and key; all are there, at 0, from the start."""
    children = {}
    for metric in metrics:
        labels = ("model_name", "engine", *metric.labels)
        parent = kind(metric.name, metric.documentation, labels, **options)
        for key in metric.keys:
            values = key.split("/")[1:]
            for index, engine in engines.items():
                children[index, key] = parent.labels(*engine, *values)
    return children
