# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Show the denoising's metrics beside vLLM's own, for servers and for `LLM` alike."""

import functools
from collections.abc import Callable
from typing import Any

from sparsed_vllm.models.registry import MODELS
from sparsed_vllm.patches.apply import Patch


def _with_our_metrics(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def init_and_add(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        if vllm_config.model_config.architecture in MODELS:
            from sparsed_vllm.metrics import DenoisingMetrics

            self.stat_loggers.insert(0, DenoisingMetrics(vllm_config, self.engine_indexes))

    return init_and_add


PATCH = Patch(
    target="vllm.v1.metrics.loggers:StatLoggerManager.__init__",
    parameters=(
        "self",
        "vllm_config",
        "engine_idxs",
        "custom_stat_loggers",
        "enable_default_loggers",
        "aggregate_engine_logging",
        "client_count",
    ),
    wrap=_with_our_metrics,
    because="Entry points of vllm.stat_logger_plugins are not read by LLM, turn statistics on for "
    "every model where they were off, and are made before vLLM clears the registry.",
    drop_when="vLLM makes stat logger plugins after its own loggers, for LLM too, and only where "
    "statistics are on.",
)
