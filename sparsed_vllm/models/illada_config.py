# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""config.json of GSAI-ML/iLLaDA-8B-* (arXiv 2606.25331)."""

from sparsed_vllm.models.configuration import Computed, DenoisingConfig


class ILLaDAConfig(DenoisingConfig):
    """Every key that modeling_illada.py reads.

    The sizes' defaults are the 8B model's; the checkpoint says rope_theta and rms_norm_eps.
    """

    model_type = "illada"
    honoured = {  # noqa: RUF012 (transformers declares such mappings so)
        "vocab_size": 155136,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": None,
        "rope_theta": None,
        # transformers 4 wrote this key where it was False, and left it out where it was True.
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": None,
    }
    computed = {  # noqa: RUF012
        "hidden_act": Computed("silu", ("silu",), "the feed-forward is silu(gate) * up"),
        "layer_norm_eps": Computed(None, (None,), "norms divide by the root mean square"),
    }
    harmless = frozenset({"attention_dropout", "resid_pdrop", "initializer_range", "use_cache"})

    @property
    def qkv_bias(self) -> bool:
        return bool(self.attention_bias)

    @property
    def output_bias(self) -> bool:
        return bool(self.attention_bias)

    @property
    def feed_forward_bias(self) -> bool:
        return bool(self.mlp_bias)
