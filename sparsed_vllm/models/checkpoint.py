# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A checkpoint's tensors, loaded only if they are all there, all of use and of the right shape."""

from collections.abc import Collection, Iterable, Iterator
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import OutOfMemoryError, Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from sparsed_vllm.models.configuration import DenoisingConfig
from sparsed_vllm.models.experts import Experts
from sparsed_vllm.models.kernel_check import no_kernel
from sparsed_vllm.models.quantized import QuantizedTensors

Shapes = dict[str, tuple[int, ...]]

_SHOWN = 6  # names in an error; more follow the same pattern


def load_checkpoint(
    model: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    mapper: WeightsMapper,
    *,
    partial: bool,
) -> set[str]:
    """Load `weights` into `model`; returns the names of its parameters that were loaded.

    vLLM's loader drops biases that no layer has, cuts tensors to the layer's size, leaves a layer
    without its tensors as it was allocated, and casts weights to integers.
    model: one of ours, with its `config` and `vllm_config`
    mapper: the checkpoint's names to the model's
    partial: some tensors may be missing
    Raises ValueError that names the tensors that are missing, unknown or of another shape.
    """
    reader = _Reader(model, mapper, partial)
    loader = AutoWeightsLoader(model)
    try:
        loaded: set[str] = loader.load_weights(reader.read(weights), mapper=mapper)
    except (AssertionError, AttributeError, RuntimeError) as error:
        config: VllmConfig = model.vllm_config
        if reader.at is None or isinstance(error, OutOfMemoryError):
            raise
        if not reader.fits:
            raise ValueError(f"Tensors do not fit config.json: {reader.at}.") from error
        if config.quant_config is None:
            raise
        raise no_kernel(config, error) from error  # to quantize what was read
    reader.check()
    if not partial:
        _check_head(model)
    return loaded


def _check_head(model: nn.Module) -> None:
    """Raise ValueError for a head of its own where config.json says that it is the embedding.

    vLLM takes a file's lm_head for it then, the authors' code the embedding.
    """
    config: VllmConfig = model.vllm_config
    untied = getattr(config.model_config, "word_embeddings_untied_by_checkpoint", False)
    if not untied:
        return
    head: Any = getattr(model.lm_head, "weight", None)
    embedding: Any = model.get_submodule("model.embed_tokens").weight
    if head is not None and not torch.equal(head.cpu(), embedding.cpu()):
        raise ValueError(
            "lm_head.weight is not the embedding, which tie_word_embeddings says it is. Remove the "
            "tensor from the checkpoint, or set the key to false in its config.json."
        )


class _Reader:
    """Passes on the tensors that the model takes, and remembers the others.

    Names are the checkpoint's (file_name), or the model's without its stacking (name): q_proj, not
    qkv_proj.
    """

    def __init__(self, model: nn.Module, mapper: WeightsMapper, partial: bool) -> None:
        self.partial = partial
        self.renamer = mapper.get_rename_mapper()
        self.expected = _expected_shapes(model)
        self.is_tied = _is_tied(model)
        self.quantized = QuantizedTensors(model, mapper, _quantized_parts(model))
        self.seen: set[str] = set()
        self.at: str | None = None  # the tensor in hand; vLLM's errors do not say
        self.fits = False  # whether it is known to have the layer's size
        self.unknown: list[str] = []
        self.wrong: list[str] = []

    def read(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for file_name, tensor in _from_files(weights):
            self.at = f"{file_name} ({list(tensor.shape)}, {tensor.dtype})"
            if self._takes(file_name, tensor):
                yield file_name, tensor
            self.at = None  # what comes next is a file's fault

    def _takes(self, file_name: str, tensor: Tensor) -> bool:
        name = self.renamer.map_name(file_name) or file_name
        self.fits = name in self.expected
        if self.fits:
            misfit = _misfit(tensor, self.expected[name])
            if name in self.seen and not self.partial:
                misfit = "a second time"
            self.seen.add(name)
        elif name == "lm_head.weight" and self.is_tied and self.partial:
            return False  # trainers send the tied head beside the embedding
        elif self.quantized.takes(file_name, name):
            misfit = self.quantized.misfit(file_name, name, tensor)
        else:
            if not _holds_nothing(name, tensor):
                self.unknown.append(file_name)
            return False
        if misfit:
            self.wrong.append(f"{file_name} ({misfit})")
        return not misfit

    def check(self) -> None:
        missing = [*(self.expected.keys() - self.seen), *self.quantized.missing]
        if missing and not self.partial:
            names = [self._file_name(name) for name in missing]
            held = f" It holds {_listed(self.unknown)} instead." if self.unknown else ""
            raise ValueError(
                f"The checkpoint lacks {_listed(names)}, which its config.json needs.{held}"
            )
        if self.unknown:
            head = " weight_tying, or tie_word_embeddings, says that the head is the embedding."
            is_head = self.is_tied and any("layers" not in name for name in self.unknown)
            raise ValueError(
                f"The checkpoint holds {_listed(self.unknown)}, which a model of its config.json "
                f"has no use for; without them it would compute something else."
                f"{head if is_head else ''}"
            )
        if self.wrong:
            raise ValueError(f"Tensors do not fit config.json: {_listed(self.wrong)}.")

    def _file_name(self, name: str) -> str:
        """The checkpoint's name for one of the model's."""
        for theirs, ours in self.renamer.orig_to_new_substr.items():
            assert ours is not None, "no tensor of ours is dropped by its name"
            name = name.replace(ours, theirs, 1)
        return name


def _from_files(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same, with an error that a user can read where a file cannot be."""
    try:
        yield from weights
    except (EOFError, KeyError, TypeError, SafetensorError, UnpicklingError) as error:
        raise ValueError(
            f"The checkpoint's files cannot be read: {type(error).__name__}: {str(error)[:200]}. "
            "Download them again."
        ) from error


def _expected_shapes(model: nn.Module) -> Shapes:
    """Every tensor that the checkpoint holds as it is, whole, not this rank's part."""
    shapes: Shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            shapes |= _linear_shapes(name, module)
        elif isinstance(module, VocabParallelEmbedding):
            if isinstance(module.quant_method, UnquantizedEmbeddingMethod):
                shapes[f"{name}.weight"] = (module.org_vocab_size, module.embedding_dim)
        elif isinstance(module, RMSNorm):
            shapes[f"{name}.weight"] = tuple(module.weight.shape)
        elif isinstance(module, Experts) and not module.are_stored_quantized:
            shapes |= module.tensor_shapes(name)
    if _is_tied(model):
        shapes.pop("lm_head.weight", None)
    return shapes


def _quantized_parts(model: nn.Module) -> dict[str, list[str]]:
    """Linear layers, embedding and head of quantized tensors -> the checkpoint's layers of each."""
    parts: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            if not _is_plain(module):
                parts[name] = list(_parts(name, module))
        elif isinstance(module, VocabParallelEmbedding):
            is_shared = name == "lm_head" and _is_tied(model)
            if not (is_shared or isinstance(module.quant_method, UnquantizedEmbeddingMethod)):
                parts[name] = [name]
    return parts


def _is_tied(model: nn.Module) -> bool:
    config = model.config
    assert isinstance(config, DenoisingConfig)
    return bool(config.tie_word_embeddings)


def _linear_shapes(name: str, linear: LinearBase) -> Shapes:
    shapes: Shapes = {}
    for part, outputs in _parts(name, linear).items():
        if _is_plain(linear):
            shapes[f"{part}.weight"] = (outputs, linear.input_size)
        if linear.bias is not None:
            shapes[f"{part}.bias"] = (outputs,)
    return shapes


def _is_plain(linear: LinearBase) -> bool:
    """Whether the checkpoint holds its weight as it is, perhaps for vLLM to quantize it."""
    method = linear.quant_method
    return isinstance(method, UnquantizedLinearMethod) or bool(method.uses_meta_device)


def _parts(name: str, linear: LinearBase) -> dict[str, int]:
    """Outputs of each of the checkpoint's layers that vLLM holds as one."""
    before, _, own = name.rpartition(".")
    if isinstance(linear, QKVParallelLinear):
        q, kv = linear.total_num_heads, linear.total_num_kv_heads
        heads = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        return {f"{before}.{part}": count * linear.head_size for part, count in heads.items()}
    if isinstance(linear, MergedColumnParallelLinear):
        gate, up = linear.output_sizes
        return {f"{before}.gate_proj": gate, f"{before}.up_proj": up}
    return {f"{before}.{own}": linear.output_size}


def _misfit(tensor: Tensor, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a tensor of a layer that is not quantized."""
    if tuple(tensor.shape) != shape:
        return f"{list(tensor.shape)} instead of {list(shape)}"
    return None if tensor.is_floating_point() else f"{tensor.dtype} where nothing is quantized"


def _holds_nothing(name: str, tensor: Tensor) -> bool:
    """Whether a tensor that no layer takes would change nothing if one did.

    Biases of zeros are GPTQ exporters'; rotary tables follow from config.json.
    """
    if tensor.numel() == 0 or ".rotary_emb." in name or name.startswith("rotary_emb."):
        return True
    return name.endswith(".bias") and not tensor.any()


def _listed(names: Collection[str]) -> str:
    first = ", ".join(sorted(names)[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{first} and {more} more" if more > 0 else first
