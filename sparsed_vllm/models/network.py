# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The transformer that all our models share, of vLLM's layers: pre-norm, SwiGLU, rotary."""

from collections.abc import Iterable
from dataclasses import replace
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
from vllm.model_executor.models.utils import (
    WeightsMapper,
    extract_layer_index,
    maybe_prefix,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from sparsed_vllm.admission import reuse_config_of, sparse_config_of
from sparsed_vllm.attention import SparsedBackend, SparsedImpl
from sparsed_vllm.config import BLOCK_SIZES
from sparsed_vllm.graphs import LightGraph
from sparsed_vllm.kernels.layout import id_dtype, num_blocks
from sparsed_vllm.model_state import DenoisingModelState
from sparsed_vllm.models.checkpoint import load_checkpoint
from sparsed_vllm.models.experts import Experts
from sparsed_vllm.models.kernel_check import check_kernels, finding_kernels
from sparsed_vllm.pages import PageLayout
from sparsed_vllm.tables import TablePages


class BidirectionalAttention(Attention):
    """vLLM's layer, whose pages hold block tables where the backend is ours."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = super().get_kv_cache_spec(vllm_config)
        if spec is None or not isinstance(self.impl, SparsedImpl):
            return spec
        return replace(spec, num_head_slots=1, state_content_bytes=self.impl.pages.bytes_per_token)


def _our_backend(
    vllm_config: VllmConfig, prefix: str, num_heads: int, num_kv_heads: int, head_size: int
) -> dict[str, Any]:
    """Arguments that give a layer our backend, which not every platform would pick by name.

    prefix: the layer's name;  num_heads, num_kv_heads: of this rank
    Nothing if the user named another backend: the models run on it, dense.
    """
    sparse_config = sparse_config_of(vllm_config)
    if sparse_config is None:
        return {}
    reuse = reuse_config_of(vllm_config)
    layer = extract_layer_index(prefix)
    num_layers = vllm_config.model_config.hf_config.num_hidden_layers
    longest = vllm_config.model_config.max_model_len
    ids = id_dtype(num_blocks(longest, min(BLOCK_SIZES)))
    return {
        "attn_backend": SparsedBackend,
        "pages": PageLayout(
            num_kv_heads,
            head_size,
            vllm_config.model_config.dtype,
            holds_kv=reuse is not None,
            tables=TablePages(num_heads, sparse_config.table_ids, ids),
        ),
        "max_num_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
        "max_model_len": longest,
        "notes_mass": reuse is not None and layer >= num_layers * (1 - reuse.layers),
    }


def _check_head_size(vllm_config: VllmConfig) -> None:
    """Raise ValueError for heads that our backend, where it is in use, has no kernel for."""
    config, sizes = vllm_config.model_config.hf_config, SparsedBackend.get_supported_head_sizes()
    head_size = config.hidden_size // config.num_attention_heads
    if sparse_config_of(vllm_config) is not None and head_size not in sizes:
        raise ValueError(
            f"Heads must have {', '.join(map(str, sizes))} dimensions, got {head_size}: there is "
            "no kernel for others. Name another --attention-backend, to run dense."
        )


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
            bias=config.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=config.output_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.rotary_emb = get_rope(
            head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        num_heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        self.attn = BidirectionalAttention(
            num_heads,
            head_dim,
            scale=head_dim**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            **_our_backend(vllm_config, prefix, num_heads, self.qkv_proj.num_kv_heads, head_dim),
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
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._norm_heads(self.q_norm, q), self._norm_heads(self.k_norm, k)
        q, k = self.rotary_emb(positions, q, k)
        return q, k, v

    def _norm_heads(self, norm: RMSNorm, rows: Tensor) -> Tensor:
        """rows [tokens, heads * head_dim], normed head by head"""
        return norm(rows.unflatten(-1, (-1, self.attn.head_size)).contiguous()).flatten(-2)

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
            bias=config.feed_forward_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=config.feed_forward_bias,
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
        feed_forward = Experts if config.experts else FeedForward
        self.mlp = feed_forward(vllm_config, f"{prefix}.mlp")

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
        """input_ids, positions [tokens] -> [tokens, hidden_size], valid only at `rows`

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


QKV = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
}
STACKED = {**QKV, ".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}
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
        self.vllm_config = vllm_config
        self.is_loaded = False
        _check_head_size(vllm_config)
        with finding_kernels(vllm_config):
            self.model = Transformer(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size, scale=config.logit_scale)
        # Of the layer that attends for few rows; vLLM knows its metadata by this name.
        self.last_attention_name = str(self.model.last_layer.self_attn.attn.layer_name)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
        rows: Tensor | None = None,
        graph: LightGraph | None = None,
    ) -> Tensor:
        """input_ids, positions [tokens] -> hidden states [tokens, hidden_size]

        rows: as in Transformer.run;  graph: the step as it was captured, which is run instead
        Both are prepared by the model state, and handed on by vLLM.
        """
        return self.model.run(input_ids, positions, rows) if graph is None else graph.replay()

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """The hidden states as they are: the sampler runs the head, over slices of the rows."""
        return hidden_states

    def score(self, hidden_states: Tensor) -> Tensor:
        """[rows, hidden_size] -> logits [rows, vocab]"""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the names of ours that were loaded.

        The first load must bring all of them, later ones (of RL trainers) may be partial. Raises
        ValueError that names tensors which are missing, unknown or of another shape.
        """
        return load_checkpoint(self, weights, self.hf_to_vllm_mapper, partial=self.is_loaded)

    def process_weights_after_loading(self) -> None:
        """Called by vLLM when every layer has its weights in its kernel's format."""
        self.is_loaded = True
        check_kernels(self, self.vllm_config)

    @staticmethod
    def get_model_state_cls() -> type[DenoisingModelState]:
        return DenoisingModelState
