# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""config.json of GSAI-ML/LLaDA-8B-* and LLaDA-1.5: every key of configuration_llada.py."""

from collections.abc import Iterator
from typing import Any

from sparsed_vllm.models.configuration import Computed, DenoisingConfig, is_integer


class LLaDAConfig(DenoisingConfig):
    """Their keys stay; vLLM's names for the same things are aliases."""

    model_type = "llada"
    attribute_map = {  # noqa: RUF012 (transformers declares it so)
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }
    honoured = {  # noqa: RUF012
        "d_model": 768,
        "n_heads": 12,
        "n_kv_heads": None,
        "multi_query_attention": None,
        "n_layers": 12,
        "mlp_ratio": 4,
        "mlp_hidden_size": None,
        "max_sequence_length": 1024,
        "vocab_size": 50257,
        "embedding_size": None,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "weight_tying": True,
        "include_qkv_bias": False,
        "scale_logits": False,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
    }
    computed = {  # noqa: RUF012
        "rope": Computed(False, (True,), "positions are told by the rotary embedding alone"),
        "alibi": Computed(False, (False,), "attention has no bias by distance"),
        "block_type": Computed("sequential", ("llama",), "only its layers have this layout"),
        "block_group_size": Computed(1, (1,), "blocks are not grouped in the checkpoint"),
        "activation_type": Computed("swiglu", ("silu",), "the feed-forward is silu(gate) * up"),
        "layer_norm_type": Computed("default", ("rms",), "norms divide by the root mean square"),
        "layer_norm_with_affine": Computed(True, (True,), "every norm has a weight"),
        "attention_layer_norm": Computed(False, (False,), "queries and keys are not normed"),
        "input_emb_norm": Computed(False, (False,), "embeddings are not scaled"),
        "include_bias": Computed(False, (False,), "only include_qkv_bias is computed"),
        "bias_for_layer_norm": Computed(None, (None, False), "norms have no bias"),
    }
    harmless = frozenset(
        {
            "alibi_bias_max",  # of alibi
            "attention_layer_norm_with_affine",  # of attention_layer_norm
            "rope_full_precision",  # rounding in 16 bits, where vLLM's kernels decide
            "flash_attention",
            "train_max_sequence_length",
            "attention_dropout",
            "residual_dropout",
            "embedding_dropout",
            "init_device",
            "init_fn",
            "init_std",
            "init_cutoff_factor",
            "precision",
            "use_cache",
        }
    )

    settled = {"embedding_size": "vocab_size", "mlp_ratio": "mlp_hidden_size"}  # noqa: RUF012

    def derived(self) -> dict[str, Any]:
        kv_heads = self.n_kv_heads
        return {
            "n_kv_heads": self._default_kv_heads if kv_heads is None else kv_heads,
            "mlp_hidden_size": self._inner_size(),
            "vocab_size": self._num_rows(),
        }

    def _inner_size(self) -> Any:
        inner, ratio, outer = self.mlp_hidden_size, self.mlp_ratio, self.d_model
        if inner is not None or not ratio or outer is None:
            return inner
        if not isinstance(ratio, int):
            raise ValueError(f"mlp_ratio must be an integer over 0, got {ratio!r}.")
        return ratio * outer

    def _num_rows(self) -> int:
        """The embedding's rows, which the authors may pad beyond the tokens in use."""
        tokens, rows = self.vocab_size, self.embedding_size or self.vocab_size
        if not is_integer(tokens, at_least=1):
            raise ValueError(f"vocab_size must be an integer over 0, got {tokens!r}.")
        if not is_integer(rows, at_least=tokens):
            raise ValueError(
                f"embedding_size must be at least {tokens} (vocab_size), an integer, or null, got "
                f"{rows!r}."
            )
        return int(rows)

    @property
    def _default_kv_heads(self) -> Any:
        return 1 if self.multi_query_attention else self.n_heads

    @property
    def qkv_bias(self) -> bool:
        return bool(self.include_qkv_bias)

    @property
    def logit_scale(self) -> float:
        return float(self.d_model**-0.5) if self.scale_logits else 1.0

    def refusals(self) -> Iterator[str]:
        yield from super().refusals()
        asked = self.multi_query_attention
        if asked is not None and self.n_kv_heads != self._default_kv_heads:
            yield (
                f"multi_query_attention: {asked} and n_kv_heads: {self.n_kv_heads} contradict "
                "each other"
            )
