# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The transformer that LLaDA and Dream share, of vLLM's layers: pre-norm, SwiGLU, rotary."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from sparsed_vllm.admission import sparse_config_of
from sparsed_vllm.attention import SparsedBackend
from sparsed_vllm.model_state import DenoisingModelState


def _our_backend(vllm_config: VllmConfig) -> dict[str, Any]:
    """Arguments that give a layer our backend, which not every platform would pick by name.

    Nothing if the user named another one: the models run on it, dense.
    """
    sparse_config = sparse_config_of(vllm_config)
    if sparse_config is None:
        return {}
    num_heads = vllm_config.model_config.hf_config.num_attention_heads
    scoring_scale = num_heads**-0.5 if sparse_config.published_scale else None
    return {"attn_backend": SparsedBackend, "scoring_scale": scoring_scale}


class SelfAttention(nn.Module):
    """Attention over the whole sequence; that it runs both ways is in the step's metadata."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        head_dim = config.hidden_size // config.num_attention_heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        self.attn = Attention(
            config.num_attention_heads // get_tensor_model_parallel_world_size(),
            head_dim,
            scale=head_dim**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            **_our_backend(vllm_config),
        )
        self.widths = [
            size * head_dim
            for size in (self.attn.num_heads, self.attn.num_kv_heads, self.attn.num_kv_heads)
        ]

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """positions [tokens], hidden_states [tokens, hidden_size] -> [tokens, hidden_size]"""
        return self.attend(*self.project(positions, hidden_states))

    def project(self, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """positions [tokens], hidden_states [tokens, hidden_size] -> q, k, v [tokens, its width]"""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.widths, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [rows, its width], k, v [tokens, ...] -> [rows, hidden_size]"""
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.activation = SiluAndMul()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[tokens, hidden_size] -> [tokens, hidden_size]"""
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(self.activation(gate_up))
        return output


class Layer(nn.Module):
    """Attention and feed-forward, each behind an RMSNorm and around a residual."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(vllm_config, f"{prefix}.mlp")

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`hidden_states` is what the layer before adds to `residual`; both [tokens, hidden]."""
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        return self.finish(hidden_states, residual)

    def begin(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What comes before attention: q, k, v and the residual, of all tokens."""
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        return *self.self_attn.project(positions, hidden_states), residual

    def finish(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What comes after attention; `hidden_states` is what that adds to `residual`."""
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile
class Transformer(nn.Module):
    """Token ids to the hidden states that the head reads, in `run`.

    Of the last layer it reads few rows, and how many changes from step to step. So `forward`, which
    vLLM compiles and may capture in CUDA graphs, ends with what that layer computes for all tokens:
    its shapes depend on their number alone. The rest runs as it is written.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.layers = nn.ModuleList(
            Layer(vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """input_ids, positions [tokens] -> q, k, v and the residual of the last layer"""
        hidden_states = self.embed_tokens(input_ids)
        residual = torch.zeros_like(hidden_states)
        for layer in islice(self.layers, len(self.layers) - 1):
            hidden_states, residual = layer(positions, hidden_states, residual)
        return self.last_layer.begin(positions, hidden_states, residual)

    @property
    def last_layer(self) -> Layer:
        layer = self.layers[-1]
        assert isinstance(layer, Layer)
        return layer

    def run(self, input_ids: Tensor, positions: Tensor, rows: Tensor | None) -> Tensor:
        """input_ids, positions [tokens] -> [tokens, hidden_size], worth something at `rows` only

        rows int64 [n], each once: the tokens whose hidden states are read; None: all
        """
        q, k, v, residual = self(input_ids, positions)
        last_layer, some = self.last_layer, slice(None) if rows is None else rows
        hidden_states = last_layer.self_attn.attend(q[some], k, v)
        del q, k, v  # the feed-forward of a long batch needs the room
        hidden_states, sums = last_layer.finish(hidden_states, residual[some])
        hidden_states, _ = self.norm(hidden_states, sums)
        if rows is None:
            return hidden_states
        # The head looks for its rows where they always are; what the others hold nobody reads.
        return residual.index_copy_(0, rows, hidden_states)


STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}
"""Tensors that vLLM's layers hold as one: name -> (name of the whole, part of it)."""


class MaskPredictor(nn.Module, SupportsQuant):
    """The transformer and its head, behind the interface of vLLM's text generation models."""

    hf_to_vllm_mapper: WeightsMapper  # a checkpoint's tensor names to ours
    packed_modules_mapping = {  # noqa: RUF012 (vLLM declares it so)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: PretrainedConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model = Transformer(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """input_ids, positions [tokens] -> hidden states [tokens, hidden_size]

        rows: as in Transformer.run; vLLM passes on what the model state prepared
        """
        return self.model.run(input_ids, positions, rows)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, vocab]"""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the names of ours that were loaded."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    @staticmethod
    def get_model_state_cls() -> type[DenoisingModelState]:
        return DenoisingModelState
