# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The kernels: Triton on a GPU, their torch twins elsewhere.

reference.py says what each function computes.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsed_vllm.kernels import reference
from sparsed_vllm.kernels.choice import Choice, Forbidden
from sparsed_vllm.kernels.layout import QueryBlocks, Span, Window, id_dtype, most_kept, num_blocks

__all__ = [
    "BLOCK_SIZES",
    "HEAD_DIMS",
    "Choice",
    "Forbidden",
    "QueryBlocks",
    "Span",
    "Window",
    "block_scores",
    "block_sparse_attention",
    "choose_tokens",
    "compile_selection",
    "dense_attention",
    "id_dtype",
    "most_kept",
    "num_blocks",
    "select_blocks",
]

logger = logging.getLogger("vllm.sparsed.kernels")

BLOCK_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (32, 64, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The oldest and the newest that the kernel for Hopper compiles on.
HOPPER_TRITONS = ((3, 6), (3, 9))


def block_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    blocks: QueryBlocks,
    *,
    scale: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean softmax mass per key block: among all keys, and among the generation's."""
    assert not blocks.has_windows, "a table has a row for every query block"
    _check_batch(blocks, q, k)
    if lse is not None:
        assert lse.shape == (q.shape[1], q.shape[0]) and lse.dtype == torch.float32
    shape = (q.shape[1], blocks.num_blocks, blocks.max_key_blocks)
    assert out is None or out[0].shape == out[1].shape == shape
    aligned = _is_aligned(q) and _is_aligned(k)
    score = _scores_kernel(q.device, q.dtype, blocks.block_size, q.shape[2], aligned)
    return score(q, k, lse, blocks, scale=scale, out=out)


def select_blocks(
    scores: Tensor,
    gen_scores: Tensor,
    blocks: QueryBlocks,
    kept: Tensor,
    num_kept: Tensor,
    rows: Tensor,
) -> None:
    """Isolated selection, written to the table's `rows` as ascending lists of key blocks."""
    shape = (scores.shape[0], blocks.num_blocks, blocks.max_key_blocks)
    assert scores.shape == gen_scores.shape == shape
    _check_table(blocks, scores.shape[0], kept, num_kept, rows)
    _for(scores, "select_blocks")(scores, gen_scores, blocks, kept, num_kept, rows)


def compile_selection(
    key_blocks: int, num_heads: int, ids: torch.dtype, device: torch.device
) -> None:
    """Compile select_blocks for sequences of up to `key_blocks`; ids: the type of the table."""
    if device.type == "cuda":
        _triton("compile_up_to", "select_blocks")(key_blocks, num_heads, ids, device)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: QueryBlocks,
    kept: Tensor,
    num_kept: Tensor,
    rows: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention over the listed key blocks; a tensor, or with return_lse a pair.

    return_lse: not of windows, for which no kernel need know where q ends
    """
    assert not (return_lse and blocks.has_windows)
    _check_batch(blocks, q, k, v)
    _check_table(blocks, q.shape[1], kept, num_kept, rows)
    table = (kept, num_kept, rows)
    aligned = all(_is_aligned(x) for x in (q, k, v, q if out is None else out))
    attend = _sparse_kernel(q.device, q.dtype, blocks.block_size, q.shape[2], aligned)
    return attend(q, k, v, blocks, *table, scale=scale, out=out, return_lse=return_lse)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: QueryBlocks,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention over all keys of a token's sequence; a tensor, or with return_lse a pair."""
    _check_batch(blocks, q, k, v)
    attend = _for(q, "dense_attention")
    return attend(q, k, v, blocks, scale=scale, out=out, return_lse=return_lse)


def choose_tokens(
    logits: Tensor, choice: Choice, forbidden: Forbidden
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of logits a token, how sure it is, and the largest logit."""
    assert logits.dtype in DTYPES, f"no kernel for {logits.dtype}"
    assert 0 <= forbidden.mask_token_id < logits.shape[1]
    if forbidden.early is not None:
        assert forbidden.early.shape == logits.shape[:1] and forbidden.early.dtype == torch.bool
        assert forbidden.stop_tokens is not None and forbidden.stop_tokens.dtype == torch.int64
    return _for(logits, "choose_tokens")(logits, choice, forbidden)


def _for(tensor: Tensor, name: str) -> Callable[..., Any]:
    """The implementation of `name` for the tensor's device; Triton is imported at need only."""
    return _triton(name) if tensor.is_cuda else getattr(reference, name)


def _triton(name: str, module: str | None = None) -> Callable[..., Any]:
    return getattr(import_module(f"sparsed_vllm.kernels.{module or name}"), name)


@cache
def _sparse_kernel(
    device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int, aligned: bool
) -> Callable[..., Any]:
    """What attends over lists; chosen, and logged, once for each kind of tensors."""
    if device.type != "cuda":
        return reference.block_sparse_attention
    obstacle = _hopper_obstacle(device, dtype, block_size, head_dim, aligned)
    if obstacle is None:
        logger.info("Sparse attention runs our Gluon kernel for Hopper.")
        return _triton("block_sparse_attention", "hopper")
    logger.info("Sparse attention runs our plain Triton kernel, not Hopper's: %s.", obstacle)
    return _triton("block_sparse_attention")


@cache
def _scores_kernel(
    device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int, aligned: bool
) -> Callable[..., Any]:
    """What scores blocks, under the same conditions; _sparse_kernel logs them."""
    if device.type != "cuda":
        return reference.block_scores
    obstacle = _hopper_obstacle(device, dtype, block_size, head_dim, aligned)
    return _triton("block_scores", None if obstacle else "hopper_scores")


def _hopper_obstacle(
    device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int, aligned: bool
) -> str | None:
    """Why the kernel for Hopper cannot run, if so."""
    capability = torch.cuda.get_device_capability(device)
    version = import_module("triton").__version__
    oldest, newest = (".".join(map(str, known)) for known in HOPPER_TRITONS)
    obstacles = {
        f"this GPU has compute capability {capability}, not (9, 0)": capability != (9, 0),
        f"Triton {version} is not one of {oldest} to {newest}": not _is_known_triton(version),
        f"it does not compute in {dtype}": dtype == torch.float32,
        f"blocks have {block_size} tokens, not 128": block_size != 128,
        f"heads have {head_dim} numbers, not 64 or 128": head_dim not in (64, 128),
        "a tensor or its strides are not aligned to 16 bytes": not aligned,
    }
    return next((text for text, stands in obstacles.items() if stands), None)


def _is_known_triton(version: str) -> bool:
    major, minor = version.split(".")[:2]
    return HOPPER_TRITONS[0] <= (int(major), int(minor)) <= HOPPER_TRITONS[1]


def _is_aligned(x: Tensor) -> bool:
    """Whether each head of each token begins at a multiple of 16 bytes, as the copy engine asks."""
    places = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:2]))
    return not any(place % 16 for place in places)


def _check_batch(blocks: QueryBlocks, q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    assert blocks.block_size in BLOCK_SIZES, f"no kernel for blocks of {blocks.block_size} tokens"
    assert q.shape[2] in HEAD_DIMS, f"no kernel for heads of {q.shape[2]}"
    assert q.dtype in DTYPES, f"no kernel for {q.dtype}"
    assert q.shape[1] % k.shape[1] == 0, "each key head serves the same number of query heads"
    assert q.shape[0] == k.shape[0] or blocks.has_windows
    for keys in (k, k if v is None else v):
        assert keys.shape == (k.shape[0], k.shape[1], q.shape[2]) and keys.dtype == q.dtype
        assert keys.stride(2) == q.stride(2) == 1, "a head's numbers lie side by side"


def _check_table(
    blocks: QueryBlocks, num_heads: int, kept: Tensor, num_kept: Tensor, rows: Tensor
) -> None:
    """`kept` may be wider than the batch needs, and its rows far apart."""
    assert kept.shape[:2] == num_kept.shape and kept.shape[1] == num_heads
    assert kept.stride(2) == 1 and num_kept.dtype == torch.int32
    assert blocks.max_key_blocks <= torch.iinfo(kept.dtype).max, f"ids outgrow {kept.dtype}"
    assert rows.shape == (blocks.num_blocks,) and rows.dtype == torch.int64
