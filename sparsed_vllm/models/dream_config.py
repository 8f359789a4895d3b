# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""config.json of Dream-org/Dream-v0-* and apple/DiffuCoder-*: Qwen2's keys and a mask."""

from collections.abc import Iterator
from typing import Any

from sparsed_vllm.models.configuration import Computed, DenoisingConfig


class DreamConfig(DenoisingConfig):
    """Every key of configuration_dream.py."""

    model_type = "Dream"
    honoured = {  # noqa: RUF012 (transformers declares such mappings so)
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": True,  # of q, k and v; the output projection has none
        "sliding_window": None,
        "layer_types": None,
        "pad_token_id": 151643,
    }
    computed = {  # noqa: RUF012
        "hidden_act": Computed("silu", ("silu",), "the feed-forward is silu(gate) * up"),
        "use_sliding_window": Computed(
            False, (False,), "every place sees every other; the layers have no windows"
        ),
        "mlp_bias": Computed(False, (False,), "the feed-forward has no biases"),
        "use_mrope": Computed(False, (False,), "positions are counted along the text alone"),
    }
    harmless = frozenset(
        {
            "max_window_layers",  # of use_sliding_window
            "attention_dropout",
            "initializer_range",
            "use_cache",
        }
    )

    def derived(self) -> dict[str, Any]:
        kv_heads, kinds = self.num_key_value_heads, self.layer_types
        if not isinstance(kinds, list | None):  # transformers looks into it
            raise ValueError(f"layer_types must be a list or null, got {kinds!r}.")
        return {
            "num_key_value_heads": self.num_attention_heads if kv_heads is None else kv_heads,
            # As Qwen2 reads it: a size that is not in use.
            "sliding_window": self.sliding_window if self.use_sliding_window else None,
        }

    @property
    def qkv_bias(self) -> bool:
        return bool(self.attention_bias)

    def refusals(self) -> Iterator[str]:
        yield from super().refusals()
        if self.sliding_window is not None and not self.use_sliding_window:
            yield "sliding_window must be absent: every place sees every other"
        if any(kind != "full_attention" for kind in self.layer_types or ()):
            yield "layer_types must be full_attention throughout: the layers have no windows"
