# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The kernels that are compared: ours and those of others, as far as they are installed.

A maker takes a case and yields its contenders. What each prepares for itself, such as another
layout or plan, is prepared once and not timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from attention.cases import BLOCK, Case
from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.block_sparse_attention import block_sparse_attention


@dataclass(frozen=True)
class Contender:
    """One kernel on one case.

    sees: the listed blocks, all of them, or nothing to compare with attention's result
    result: what `call` returns -> [length, heads, head_dim]
    products: matrix products by those of attention, where it has others
    """

    name: str
    call: Callable[[], Any]
    sees: Literal["lists", "all", "nothing"]
    result: Callable[[Any], Tensor] = lambda out: out
    products: float = 1.0

    def share(self, case: Case) -> float:
        """Of dense attention's operations."""
        return self.products * (case.share if self.sees == "lists" else 1.0)


Maker = Callable[[Case], Iterator[Contender]]


def ours(case: Case) -> Iterator[Contender]:
    q, k, v = case.qkv
    layout, selection, scale = case.layout, case.selection, case.scale
    lse = api.dense_attention(q, k, v, layout, scale=scale, return_lse=True)[1]
    scores = api.block_scores(q, k, lse, layout, selection, scale=scale)
    written = case.recorded()
    sparse = partial(block_sparse_attention, q, k, v, layout, case.tables, scale=scale)
    dense = partial(api.dense_attention, q, k, v, layout, scale=scale)
    score = partial(api.block_scores, q, k, lse, layout, selection, scale=scale)
    select = partial(api.select_blocks, *scores, layout, selection, written)
    yield Contender("ours_triton", sparse, "lists")
    yield Contender("ours_dense", dense, "all")
    yield Contender("block_scores", score, "nothing", products=0.5)
    yield Contender("select_blocks", select, "nothing", products=0.0)


def hopper(case: Case) -> Iterator[Contender]:
    from sparsed_vllm.kernels import hopper

    options = {"scale": case.scale}
    call = partial(hopper.block_sparse_attention, *case.qkv, case.layout, case.tables, **options)
    yield Contender("ours_gluon", call, "lists")


def flash(case: Case) -> Iterator[Contender]:
    """FlashAttention as vLLM calls it; its log-sum-exp comes for nothing.

    `_tiles128` is dense attention without one key for the last query: as a window, this takes
    tiles of 128 keys in FA3 where all keys take 176. `_pages` poses the lists as pages: one short
    sequence for each head and query block.
    """
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version()
    attend = partial(fa_utils.flash_attn_varlen_func, softmax_scale=case.scale, fa_version=version)
    ends = torch.tensor([0, case.length], dtype=torch.int32, device="cuda")
    lengths = {"max_seqlen_q": case.length, "max_seqlen_k": case.length}
    whole = partial(attend, *case.qkv, cu_seqlens_q=ends, cu_seqlens_k=ends, **lengths)
    window = [case.length - 2, -1]
    name = f"fa{version}"
    yield Contender(f"{name}_dense", partial(whole, return_softmax_lse=True), "all", first)
    yield Contender(f"{name}_tiles128", partial(whole, window_size=window), "all", first)
    paged = partial(attend, **paged_inputs(case), num_splits=1)
    yield Contender(f"{name}_pages", paged, "lists", lambda out: tokens_first(first(out), case))


def square(case: Case) -> Case:
    """Raises ValueError where lists are not of blocks of 128 x 128, which is all that it takes."""
    if case.block_size != BLOCK:
        raise ValueError(f"its key blocks have {BLOCK} tokens, not {case.block_size}")
    return case


def first(out: Any) -> Tensor:
    """The attention of what may come with its log-sum-exp."""
    return out[0] if isinstance(out, tuple) else out


def tokens_first(out: Tensor, case: Case) -> Tensor:
    """Of what lies head after head."""
    return out.reshape(case.num_heads, case.length, -1).transpose(0, 1)


def paged_inputs(case: Case) -> dict[str, Any]:
    """The lists as block tables over pages of one head, which overlap in memory."""
    q, k, v = square(case).qkv
    row, dim = k.stride(0), k.shape[2]
    step = BLOCK * row // dim  # pages from a block to the next
    heads = torch.arange(case.num_heads, device=k.device) // case.group
    table = case.ids * step + heads[:, None, None]
    count = (case.num_blocks - 1) * step + k.shape[1]
    k, v = (x.as_strided((count, BLOCK, 1, dim), (dim, row, dim, 1)) for x in (k, v))
    tokens = case.num_heads * case.length
    return {
        "q": q.transpose(0, 1).reshape(tokens, 1, dim),
        "k": k,
        "v": v,
        "block_table": table.flatten(0, 1).int(),
        "seqused_k": case.counts.flatten() * BLOCK,
        "cu_seqlens_q": torch.arange(0, tokens + 1, BLOCK, dtype=torch.int32, device=q.device),
        "max_seqlen_q": BLOCK,
        "max_seqlen_k": case.length,
    }


def fa4(case: Case) -> Iterator[Contender]:
    """FlashAttention 4's CuTe kernels (flash-attn-4), on Hopper in tiles of 128 x 128."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    q, k, v = (x[None] for x in square(case).qkv)
    counts = case.counts[None]
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(counts)[..., None],
        full_block_cnt=counts,
        full_block_idx=case.ids[None],
        block_size=(BLOCK, BLOCK),
    )
    attend = partial(flash_attn_func, q, k, v, softmax_scale=case.scale)
    yield Contender("fa4_dense", attend, "all", lambda out: first(out)[0])
    yield Contender(
        "fa4_lists", partial(attend, block_sparse_tensors=lists), "lists", lambda out: first(out)[0]
    )


def flashinfer(case: Case) -> Iterator[Contender]:
    """Its lists are those of key heads: heads that share one get copies of its keys."""
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    q, k, v = (x[0] for x in square(case).heads_first)
    k, v = (x.repeat_interleave(case.group, dim=0) for x in (k, v))
    rooms = (torch.empty(128 << 20, dtype=torch.uint8, device=q.device) for _ in range(2))
    float_room, int_room = rooms
    wrapper = VariableBlockSparseAttentionWrapper(float_room)
    wrapper.reset_workspace_buffer(float_room, int_room)
    sizes = torch.full_like(case.counts, BLOCK)
    heads = {"num_qo_heads": len(q), "num_kv_heads": len(q), "head_dim": q.shape[-1]}
    options = {"sm_scale": case.scale, "q_data_type": q.dtype}
    wrapper.plan(case.mask, sizes, sizes, **heads, **options)
    yield Contender(
        "flashinfer_lists",
        partial(wrapper.run, q, k, v),
        "lists",
        lambda out: tokens_first(out, case),
    )


def cudnn(case: Case) -> Iterator[Contender]:
    options = {"scale": case.scale, "enable_gqa": case.group > 1}

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*case.heads_first, **options)

    yield Contender("cudnn_dense", call, "all", lambda out: out[0].transpose(0, 1))


def xformers(case: Case) -> Iterator[Contender]:
    from xformers.ops import memory_efficient_attention

    q, k, v = (x[None] for x in case.qkv)
    if case.group > 1:
        q = q.unflatten(2, (-1, case.group))
        k, v = (x[:, :, :, None].expand_as(q) for x in (k, v))
    call = partial(memory_efficient_attention, q, k, v, scale=case.scale)
    yield Contender("xformers_dense", call, "all", lambda out: out[0].reshape(case.qkv[0].shape))


FLEX: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flex": ({}, {}),
    "flex_tma": (
        {},
        {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2, "USE_TMA": True},
    ),
    "flex_autotuned": (
        {"mode": "max-autotune-no-cudagraphs"},
        {"USE_TMA": True, "PRESCALE_QK": True, "ROWS_GUARANTEED_SAFE": True},
    ),
}
"""FlexAttention: options of torch.compile and of its kernel."""


def flex(case: Case, name: str) -> Iterator[Contender]:
    """Over the same lists, as full blocks."""
    call = partial(
        compiled_flex(name, case.shape, case.length),
        *case.heads_first,
        block_mask=flex_mask(case),
        scale=case.scale,
        enable_gqa=case.group > 1,
        kernel_options=FLEX[name][1] or None,
    )
    yield Contender(name, call, "lists", lambda out: out[0].transpose(0, 1))


@cache
def compiled_flex(name: str, shape: str, length: int) -> Callable[..., Tensor]:
    forget_compiled(shape, length)
    return torch.compile(flex_attention, dynamic=False, **FLEX[name][0])


@lru_cache(maxsize=1)
def forget_compiled(shape: str, length: int) -> None:
    """At the first kernel of other sizes: torch compiles a function for a few of them only."""
    torch._dynamo.reset()


def flex_mask(case: Case) -> BlockMask:
    counts = square(case).counts[None]
    full = pad(case.ids[None], (0, case.num_blocks - case.ids.shape[-1])).contiguous()
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(full), counts, full, BLOCK
    )


MAKERS: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "vLLM's FlashAttention": (
        flash,
        (*("fa3_dense", "fa3_tiles128", "fa3_pages"), *("fa2_dense", "fa2_tiles128", "fa2_pages")),
    ),
    "our kernels": (ours, ("ours_triton", "ours_dense", "block_scores", "select_blocks")),
    "our kernel for Hopper": (hopper, ("ours_gluon",)),
    "FlashAttention 4": (fa4, ("fa4_dense", "fa4_lists")),
    "FlashInfer": (flashinfer, ("flashinfer_lists",)),
    "cuDNN": (cudnn, ("cudnn_dense",)),
    "xformers": (xformers, ("xformers_dense",)),
    **{f"FlexAttention, {name}": (partial(flex, name=name), (name,)) for name in FLEX},
}
"""Makers, and the names of the contenders that they may yield."""

NAMES = tuple(name for _, names in MAKERS.values() for name in names)
