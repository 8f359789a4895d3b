# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Small random checkpoints in the layouts in which the models' authors publish theirs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

NUM_BYTES = 256  # token ids 0..255 are bytes, then come the special tokens, the rest is unused
LLADA_SPECIALS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
ILLADA_SPECIALS = (  # ids 0 to 5, before the bytes
    "<|startoftext|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<[MASK]>",
)
DREAM_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
LLADA_MASK_ID = NUM_BYTES + LLADA_SPECIALS.index("<|mdm_mask|>")
LLADA_EOS_ID = NUM_BYTES + LLADA_SPECIALS.index("<|endoftext|>")
LLADA_EOT_ID = NUM_BYTES + LLADA_SPECIALS.index("<|eot_id|>")
ILLADA_MASK_ID = ILLADA_SPECIALS.index("<[MASK]>")  # 5 in the real one too
ILLADA_EOS_ID = ILLADA_SPECIALS.index("<|endoftext|>")
DREAM_MASK_ID = NUM_BYTES + DREAM_SPECIALS.index("<|mask|>")
DREAM_EOS_ID = NUM_BYTES + DREAM_SPECIALS.index("<|endoftext|>")

LLADA_CHAT = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
)
DREAM_CHAT = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a network; a head of 32 is the smallest that vLLM's attention on the CPU takes."""

    vocab_size: int = 320
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 4
    d_model: int = 128
    mlp_hidden_size: int = 192
    max_length: int = 1024
    num_experts: int = 8
    experts_per_token: int = 2

    @property
    def kv_size(self) -> int:
        return self.d_model // self.n_heads * self.n_kv_heads


def write_llada(
    path: str | Path, *, seed: int = 0, shards: int = 1, tie: bool = False, **sizes: int
) -> Path:
    """Write a checkpoint like GSAI-ML/LLaDA-8B-Instruct; sizes are the fields of Shape."""
    shape = Shape(**sizes)
    folder = _folder(path)
    write_json(folder / "config.json", llada_config(shape, tie))
    write_json(folder / "generation_config.json", {"eos_token_id": LLADA_EOS_ID})
    _write_weights(folder, _draw(_llada_weights(shape, tie), seed), shards)
    _write_tokenizer(folder, LLADA_SPECIALS, "<|startoftext|>", LLADA_CHAT)
    return folder


def write_dream(
    path: str | Path, *, seed: int = 0, shards: int = 1, tie: bool = False, **sizes: int
) -> Path:
    """Write a checkpoint like Dream-org/Dream-v0-Instruct-7B; sizes are the fields of Shape."""
    shape = Shape(**sizes)
    folder = _folder(path)
    write_json(folder / "config.json", dream_config(shape, tie))
    write_json(folder / "generation_config.json", dream_generation_config())
    _write_weights(folder, _draw(_qwen_weights(shape, tie, qkv_bias=True), seed), shards)
    _write_tokenizer(folder, DREAM_SPECIALS, "<|beginoftext|>", DREAM_CHAT)
    return folder


def write_illada(
    path: str | Path, *, seed: int = 0, shards: int = 1, tie: bool = True, **sizes: int
) -> Path:
    """Write a checkpoint like GSAI-ML/iLLaDA-8B-Instruct; sizes are the fields of Shape."""
    shape = Shape(**sizes)
    folder = _folder(path)
    write_json(folder / "config.json", illada_config(shape, tie))
    write_json(folder / "generation_config.json", {"eos_token_id": ILLADA_EOS_ID})
    weights = _qwen_weights(shape, tie, qkv_bias=False)
    _write_weights(folder, _draw(weights, seed), shards)
    _write_tokenizer(folder, ILLADA_SPECIALS, "<|startoftext|>", LLADA_CHAT, specials_first=True)
    return folder


def write_llada_moe(
    path: str | Path, *, seed: int = 0, shards: int = 1, tie: bool = False, **sizes: int
) -> Path:
    """Write a checkpoint like inclusionAI/LLaDA-MoE-7B-A1B-Instruct; sizes: fields of Shape."""
    shape = Shape(**sizes)
    folder = _folder(path)
    write_json(folder / "config.json", llada_moe_config(shape, tie))
    write_json(folder / "generation_config.json", {"eos_token_id": LLADA_EOS_ID})
    _write_weights(folder, _draw(_llada_moe_weights(shape, tie), seed), shards)
    _write_tokenizer(folder, LLADA_SPECIALS, "<|startoftext|>", LLADA_CHAT)
    return folder


def llada_config(shape: Shape, tie: bool) -> dict[str, Any]:
    """The keys of LLaDA's config.json (configuration_llada.py) with small sizes."""
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": shape.d_model,
        "embedding_dropout": 0.0,
        "embedding_size": shape.vocab_size,
        "eos_token_id": LLADA_EOS_ID,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": LLADA_MASK_ID,
        "max_sequence_length": shape.max_length,
        "mlp_hidden_size": shape.mlp_hidden_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "n_layers": shape.n_layers,
        "pad_token_id": LLADA_EOS_ID,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": shape.vocab_size,
        "weight_tying": tie,
    }


def dream_config(shape: Shape, tie: bool) -> dict[str, Any]:
    """The keys of Dream's config.json (configuration_dream.py) with small sizes."""
    return {
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        "bos_token_id": DREAM_EOS_ID,
        "eos_token_id": DREAM_EOS_ID,
        "hidden_act": "silu",
        "hidden_size": shape.d_model,
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp_hidden_size,
        "mask_token_id": DREAM_MASK_ID,
        "max_position_embeddings": shape.max_length,
        "max_window_layers": 28,
        "model_type": "Dream",
        "num_attention_heads": shape.n_heads,
        "num_hidden_layers": shape.n_layers,
        "num_key_value_heads": shape.n_kv_heads,
        "pad_token_id": DREAM_EOS_ID,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": tie,
        "torch_dtype": "float32",
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }


def illada_config(shape: Shape, tie: bool) -> dict[str, Any]:
    """The keys that iLLaDA's code (modeling_illada.py) reads, with small sizes; no mask's."""
    return {
        "architectures": ["ILLaDAForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_illada.ILLaDAConfig",
            "AutoModel": "modeling_illada.ILLaDAForCausalLM",
            "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
        },
        "dtype": "float32",
        "eos_token_id": ILLADA_EOS_ID,
        "hidden_act": "silu",
        "hidden_size": shape.d_model,
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp_hidden_size,
        "layer_norm_eps": None,
        "max_position_embeddings": shape.max_length,
        "mlp_bias": False,
        "model_type": "illada",
        "num_attention_heads": shape.n_heads,
        "num_hidden_layers": shape.n_layers,
        "num_key_value_heads": shape.n_kv_heads,
        "pad_token_id": ILLADA_EOS_ID,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": tie,
        "transformers_version": "4.57.1",
        "use_cache": False,
        "vocab_size": shape.vocab_size,
    }


def llada_moe_config(shape: Shape, tie: bool) -> dict[str, Any]:
    """The keys of LLaDA-MoE's configuration_lladamoe.py with small sizes.

    The real one has no mask_token_id, which its vocabulary makes 156895.
    """
    return {
        "architectures": ["LLaDAMoEModelLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_lladamoe.LLaDAConfig",
            "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
        },
        "clip_qkv": None,
        "dense_intermediate_size": 4 * shape.d_model,
        "eos_token_id": LLADA_EOS_ID,
        "expert_intermediate_size": shape.mlp_hidden_size,
        "hidden_act": "silu",
        "hidden_size": shape.d_model,
        "initializer_range": 0.02,
        "mask_token_id": LLADA_MASK_ID,
        "max_position_embeddings": shape.max_length,
        "model_type": "llada",
        "moe_layer_freq": [1] * shape.n_layers,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "num_attention_heads": shape.n_heads,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "num_hidden_layers": shape.n_layers,
        "num_key_value_heads": shape.n_kv_heads,
        "output_router_logits": False,
        "pad_token_id": LLADA_EOS_ID,
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 50000,
        "routed_scaling_factor": 1,
        "router_aux_loss_coef": 0.01,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": None,
        "tie_word_embeddings": tie,
        "torch_dtype": "float32",
        "transformers_version": "4.53.2",
        "use_cache": False,
        "vocab_size": shape.vocab_size,
    }


def dream_generation_config() -> dict[str, Any]:
    """Dream publishes its decoding defaults; the mask token is null there, the config names it."""
    return {
        "_from_model_config": True,
        "alg": "origin",
        "alg_temp": None,
        "bos_token_id": DREAM_EOS_ID,
        "eos_token_id": DREAM_EOS_ID,
        "eps": 0.001,
        "mask_token_id": None,
        "output_history": False,
        "pad_token_id": DREAM_EOS_ID,
        "steps": 512,
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
        "transformers_version": "4.46.2",
    }


Sizes = dict[str, tuple[int, ...]]


def _llada_weights(shape: Shape, tie: bool) -> Sizes:
    """Name -> size of every tensor of modeling_llada.py, block type "llama"."""
    hidden, mlp, top = shape.d_model, shape.mlp_hidden_size, "model.transformer."
    sizes: Sizes = {top + "wte.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.n_layers):
        block = f"{top}blocks.{layer}."
        sizes |= {
            block + "attn_norm.weight": (hidden,),
            block + "q_proj.weight": (hidden, hidden),
            block + "k_proj.weight": (shape.kv_size, hidden),
            block + "v_proj.weight": (shape.kv_size, hidden),
            block + "attn_out.weight": (hidden, hidden),
            block + "ff_norm.weight": (hidden,),
            block + "ff_proj.weight": (mlp, hidden),
            block + "up_proj.weight": (mlp, hidden),
            block + "ff_out.weight": (hidden, mlp),
        }
    sizes[top + "ln_f.weight"] = (hidden,)
    return sizes if tie else sizes | {top + "ff_out.weight": (shape.vocab_size, hidden)}


def _qwen_weights(shape: Shape, tie: bool, *, qkv_bias: bool) -> Sizes:
    """Name -> size of every tensor of modeling_dream.py or modeling_illada.py (Qwen2's names)."""
    hidden, mlp = shape.d_model, shape.mlp_hidden_size
    sizes: Sizes = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.n_layers):
        block = f"model.layers.{layer}."
        sizes |= {
            block + "input_layernorm.weight": (hidden,),
            **_attention_weights(shape, block, qkv_bias=qkv_bias),
            block + "post_attention_layernorm.weight": (hidden,),
            block + "mlp.gate_proj.weight": (mlp, hidden),
            block + "mlp.up_proj.weight": (mlp, hidden),
            block + "mlp.down_proj.weight": (hidden, mlp),
        }
    sizes["model.norm.weight"] = (hidden,)
    return sizes if tie else sizes | {"lm_head.weight": (shape.vocab_size, hidden)}


def _attention_weights(shape: Shape, block: str, *, qkv_bias: bool) -> Sizes:
    sizes: Sizes = {}
    for part, size in (("q", shape.d_model), ("k", shape.kv_size), ("v", shape.kv_size)):
        sizes[f"{block}self_attn.{part}_proj.weight"] = (size, shape.d_model)
        if qkv_bias:
            sizes[f"{block}self_attn.{part}_proj.bias"] = (size,)
    sizes[f"{block}self_attn.o_proj.weight"] = (shape.d_model, shape.d_model)
    return sizes


def _llada_moe_weights(shape: Shape, tie: bool) -> Sizes:
    """Name -> size of every tensor of modeling_lladamoe.py."""
    hidden, inner = shape.d_model, shape.mlp_hidden_size
    head = hidden // shape.n_heads
    sizes: Sizes = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.n_layers):
        block = f"model.layers.{layer}."
        sizes |= {
            block + "input_layernorm.weight": (hidden,),
            **_attention_weights(shape, block, qkv_bias=False),
            block + "self_attn.q_norm.weight": (head,),
            block + "self_attn.k_norm.weight": (head,),
            block + "post_attention_layernorm.weight": (hidden,),
            block + "mlp.gate.weight": (shape.num_experts, hidden),
        }
        for expert in range(shape.num_experts):
            name = f"{block}mlp.experts.{expert}."
            sizes |= {
                name + "gate_proj.weight": (inner, hidden),
                name + "up_proj.weight": (inner, hidden),
                name + "down_proj.weight": (hidden, inner),
            }
    sizes["model.norm.weight"] = (hidden,)
    return sizes if tie else sizes | {"lm_head.weight": (shape.vocab_size, hidden)}


def _draw(sizes: Sizes, seed: int) -> dict[str, torch.Tensor]:
    """Draw every tensor: norms around one, biases small, matrices with a gain.

    Chosen by trial so that a masked place depends on its context and position, confidences
    spread from 0.1 to 0.9, and float32 rounding moves a logit by some 1e-5, not more.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in sizes.items():
        noise = torch.randn(size, generator=generator)
        if len(size) == 2:
            weights[name] = noise * _gain(name) * size[1] ** -0.5
        else:
            weights[name] = 0.3 * noise if name.endswith("bias") else 1 + 0.1 * noise
    return weights


def _gain(name: str) -> float:
    """By how much a matrix makes its input larger."""
    if name in ("model.transformer.ff_out.weight", "lm_head.weight"):
        return 3.0
    module = name.split(".")[-2]
    if module in ("q_proj", "k_proj"):
        return 1.4
    return 2.0 if module in ("wte", "embed_tokens", "v_proj", "attn_out", "o_proj") else 1.0


def _write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    """One file, or several with an index; neighbours in the network lie in different shards."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = list(weights)[shard::shards]
        save_file({n: weights[n] for n in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def _write_tokenizer(
    folder: Path, specials: tuple[str, ...], bos: str, chat: str, specials_first: bool = False
) -> None:
    """A byte-level tokenizer without merges: any text survives a round trip."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*specials, *alphabet] if specials_first else [*alphabet, *specials]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    save_tokenizer(folder, tokenizer, bos, chat)


def save_tokenizer(folder: Path, tokenizer: Tokenizer, bos: str, chat: str, **more: str) -> None:
    """tokenizer.json and tokenizer_config.json, as transformers reads them.

    more: further settings, such as the unknown token
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": chat,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **more,
    }
    write_json(folder / "tokenizer_config.json", settings)


def _folder(path: str | Path) -> Path:
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
