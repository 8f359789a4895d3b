# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""LLaDA (arXiv 2502.09992) and LLaDA-1.5: the checkpoints' tensor names."""

from vllm.model_executor.models.utils import WeightsMapper

from sparsed_vllm.models.network import STACKED, MaskPredictor


class LLaDAModelLM(MaskPredictor):
    """A place's hidden state predicts the token of that place."""

    # Also of modules, which quantization names in its lists: no dot at the end.
    # `ff_out` is both a block's down projection and, outside the blocks, the head.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={
            "model.transformer.blocks.": "model.layers.",
            ".attn_norm": ".input_layernorm",
            ".q_proj": ".self_attn.q_proj",
            ".k_proj": ".self_attn.k_proj",
            ".v_proj": ".self_attn.v_proj",
            ".attn_out": ".self_attn.o_proj",
            ".ff_norm": ".post_attention_layernorm",
            ".ff_proj": ".mlp.gate_proj",
            ".up_proj": ".mlp.up_proj",
            "model.transformer.ff_out": "lm_head",
            ".ff_out": ".mlp.down_proj",
            "model.transformer.wte": "model.embed_tokens",
            "model.transformer.ln_f": "model.norm",
        },
        orig_to_new_stacked=STACKED,
    )
