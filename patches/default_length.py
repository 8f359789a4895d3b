# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Give requests that name no length a default one, instead of all that is left of the context."""

import functools
from collections.abc import Callable
from typing import Any

from sparsed_vllm.patches.apply import Patch


def _with_length(defaults_of: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(defaults_of)
    def defaults_with_length(self: Any) -> dict[str, Any]:
        defaults = defaults_of(self)
        length = getattr(self.hf_config, "default_max_tokens", None)  # the config hook sets it
        # Of a generation config in a folder of its own, vLLM makes a limit as well.
        if length is not None and self.generation_config in ("auto", "vllm"):
            defaults["max_tokens"] = length
        return defaults

    return defaults_with_length


PATCH = Patch(
    target="vllm.config.model:ModelConfig.get_diff_sampling_param",
    parameters=("self",),
    wrap=_with_length,
    because="What a plugin can set, max_new_tokens in override_generation_config, is a default "
    "and a limit: it would cut the canvas of requests that ask for more.",
    drop_when="a default for max_tokens can be set that is no limit.",
)
