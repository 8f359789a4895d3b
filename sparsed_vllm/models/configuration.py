# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The authors' config.json files, read without their remote code, under the names vLLM uses."""

from typing import Any

from transformers import PretrainedConfig


class LLaDAConfig(PretrainedConfig):
    """config.json of GSAI-ML/LLaDA-8B-* and LLaDA-1.5.

    Their keys stay; vLLM's names for the same things are aliases.
    """

    model_type = "llada"
    attribute_map = {  # noqa: RUF012 (transformers declares it so)
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        n_layers: int = 32,
        mlp_hidden_size: int = 12288,
        max_sequence_length: int = 4096,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        rope_theta: float = 500000.0,
        rms_norm_eps: float = 1e-5,
        weight_tying: bool = False,
        include_bias: bool = False,
        include_qkv_bias: bool = False,
        mask_token_id: int = 126336,
        eos_token_id: int = 126081,
        pad_token_id: int = 126081,
        **kwargs: Any,
    ) -> None:
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.n_layers = n_layers
        self.mlp_hidden_size = mlp_hidden_size
        self.max_sequence_length = max_sequence_length
        # The embedding's rows, which the authors may pad beyond the tokens in use.
        self.vocab_size = embedding_size or vocab_size
        self.rms_norm_eps = rms_norm_eps
        self.hidden_act = "silu"
        self.attention_bias = include_bias or include_qkv_bias
        self.mask_token_id = mask_token_id
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
        kwargs["tie_word_embeddings"] = weight_tying
        super().__init__(eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)


class DreamConfig(PretrainedConfig):
    """config.json of Dream-org/Dream-v0-* and apple/DiffuCoder-*: Qwen2's keys and a mask."""

    model_type = "Dream"

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 131072,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        rope_scaling: dict[str, Any] | None = None,
        mask_token_id: int = 151666,
        pad_token_id: int = 151643,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.attention_bias = True  # of q, k and v; the output projection has none
        self.mask_token_id = mask_token_id
        rope = {"rope_type": "default", **(rope_scaling or {})}
        self.rope_parameters = {**rope, "rope_theta": rope_theta}
        super().__init__(
            pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs
        )
