# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""One layer's attention: our kernels beside those of others, one JSON line for each.

    python benchmarks/bench_attention.py --quick >> benchmarks/results/attention.jsonl

Kernels take turns, in another order each round, so that a hot card is hot for all. `ms` is the
median of the rounds, `spread` the widest difference between two. `tflops` counts kept blocks only,
`ratio_to_fa3` compares with FlashAttention 3 over all keys in the same rounds, `ratio_to_floor`
with the kept blocks' operations at 989 TFLOP/s. A kernel that cannot run here is named on stderr.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.block_sparse_attention import block_sparse_attention

SHAPES = {"llada": (32, 32, 128), "dream": (28, 4, 128), "head64": (32, 32, 64)}
LISTS = ("random", "recorded")
BLOCK = 128
CANVAS = 256  # tokens being generated, at the end
PEAK = 989e12  # an H100's dense bf16 operations a second
QUICK = {"shape": ["llada"], "lengths": [65536, 16384, 4096], "density": [0.3]}
SLOW = {"flex_autotuned"}  # to compile: no part of the quick set

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """What is attended to. `density`: the share of blocks asked for."""

    shape: str
    length: int
    density: float
    lists: str

    @property
    def scale(self) -> float:
        return float(SHAPES[self.shape][2] ** -0.5)

    @cached_property
    def qkv(self) -> tuple[Tensor, ...]:
        """[length, heads, head_dim] each, slices of one tensor as a fused projection has them."""
        heads, kv_heads, dim = SHAPES[self.shape]
        fused = torch.randn(
            self.length, heads + 2 * kv_heads, dim, dtype=torch.bfloat16, device="cuda"
        )
        if self.lists == "recorded":
            fused[:, : heads + kv_heads] = rotated(fused[:, : heads + kv_heads])
        return fused.split([heads, kv_heads, kv_heads], dim=1)

    @cached_property
    def blocks(self) -> api.QueryBlocks:
        span = api.Span(0, self.length, self.length - CANVAS, self.density)
        return api.QueryBlocks.of([span], BLOCK, "cuda")

    @cached_property
    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """kept [blocks, heads, width], num_kept [blocks, heads], rows [blocks]"""
        return self.recorded() if self.lists == "recorded" else self.random()

    def random(self) -> tuple[Tensor, Tensor, Tensor]:
        """Equally many blocks for each, ascending."""
        heads, count = SHAPES[self.shape][0], self.blocks.num_blocks
        keep = max(1, round(count * self.density))
        picks = torch.rand(count, heads, count, device="cuda").topk(keep, dim=-1).indices
        num_kept = torch.full((count, heads), keep, dtype=torch.int32, device="cuda")
        return picks.sort(-1).values.short(), num_kept, torch.arange(count, device="cuda")

    def recorded(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a recording step keeps."""
        heads, count = SHAPES[self.shape][0], self.blocks.num_blocks
        kept = torch.empty(count, heads, self.blocks.most_kept, dtype=torch.int16, device="cuda")
        num_kept = torch.empty(count, heads, dtype=torch.int32, device="cuda")
        table = (kept, num_kept, torch.arange(count, device="cuda"))
        scores = api.block_scores(*self.qkv[:2], None, self.blocks, scale=self.scale)
        api.select_blocks(*scores, self.blocks, *table)
        return table

    @cached_property
    def share(self) -> float:
        """Of the blocks, those that the lists name."""
        return float(self.table[1].double().mean()) / self.blocks.num_blocks


def rotated(x: Tensor) -> Tensor:
    """With a direction of its own for each head, and rotary positions: near keys weigh more."""
    length, _, dim = x.shape
    x = (x + 2 * torch.randn_like(x[:1])).float()
    angles = torch.outer(
        torch.arange(length, device=x.device),
        500000.0 ** -torch.linspace(0, 1, dim // 2, device=x.device),
    )[:, None]
    a, b = x.chunk(2, dim=-1)
    turned = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
    return torch.cat(turned, -1).to(torch.bfloat16)


def ours(case: Case) -> Iterator[tuple[str, Call, float]]:
    (q, k, v), blocks, table, scale = case.qkv, case.blocks, case.table, case.scale
    lse = api.dense_attention(q, k, v, blocks, scale=scale, return_lse=True)[1]
    scores = api.block_scores(q, k, lse, blocks, scale=scale)
    written = case.recorded()
    yield (
        "ours_triton",
        lambda: block_sparse_attention(q, k, v, blocks, *table, scale=scale),
        case.share,
    )
    yield "ours_dense", lambda: api.dense_attention(q, k, v, blocks, scale=scale), 1.0
    # One product of the two.
    yield "block_scores", lambda: api.block_scores(q, k, lse, blocks, scale=scale), 0.5
    yield "select_blocks", lambda: api.select_blocks(*scores, blocks, *written), 0.0


def hopper(case: Case) -> Iterator[tuple[str, Call, float]]:
    from sparsed_vllm.kernels import hopper

    (q, k, v), blocks, table, scale = case.qkv, case.blocks, case.table, case.scale
    yield (
        "ours_gluon",
        lambda: hopper.block_sparse_attention(q, k, v, blocks, *table, scale=scale),
        case.share,
    )


def flash(case: Case) -> Iterator[tuple[str, Call, float]]:
    """FlashAttention as vLLM calls it; its log-sum-exp comes for nothing."""
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version()
    ends = torch.tensor([0, case.length], dtype=torch.int32, device="cuda")
    yield (
        f"fa{version}_dense",
        lambda: fa_utils.flash_attn_varlen_func(
            *case.qkv,
            max_seqlen_q=case.length,
            cu_seqlens_q=ends,
            max_seqlen_k=case.length,
            cu_seqlens_k=ends,
            softmax_scale=case.scale,
            causal=False,
            return_softmax_lse=True,
            fa_version=version,
        ),
        1.0,
    )


def heads_first(case: Case) -> list[Tensor]:
    """[1, heads, length, head_dim], dense"""
    return [x.transpose(0, 1)[None].contiguous() for x in case.qkv]


def cudnn(case: Case) -> Iterator[tuple[str, Call, float]]:
    qkv = heads_first(case)
    options = {"scale": case.scale, "enable_gqa": qkv[0].shape[1] != qkv[1].shape[1]}

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*qkv, **options)

    yield "cudnn_dense", call, 1.0


def xformers(case: Case) -> Iterator[tuple[str, Call, float]]:
    from xformers.ops import memory_efficient_attention

    q, k, v = (x[None] for x in case.qkv)
    group = q.shape[2] // k.shape[2]
    if group > 1:
        q = q.unflatten(2, (-1, group))
        k, v = (x[:, :, :, None].expand_as(q) for x in (k, v))
    yield "xformers_dense", lambda: memory_efficient_attention(q, k, v, scale=case.scale), 1.0


FLEX = {
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


def flex(case: Case, name: str) -> Iterator[tuple[str, Call, float]]:
    """Over the same lists, as full blocks."""
    compile_options, kernel_options = FLEX[name]
    qkv = heads_first(case)
    compiled = torch.compile(flex_attention, dynamic=False, **compile_options)
    options = {
        "block_mask": flex_mask(case),
        "scale": case.scale,
        "enable_gqa": qkv[0].shape[1] != qkv[1].shape[1],
        "kernel_options": kernel_options or None,
    }
    yield name, lambda: compiled(*qkv, **options), case.share


def flex_mask(case: Case) -> BlockMask:
    kept, num_kept, rows = case.table
    ids = kept[rows].int().clamp(min=0).transpose(0, 1)[None]
    full = pad(ids, (0, case.blocks.num_blocks - ids.shape[-1])).contiguous()
    counts = num_kept[rows].T[None].contiguous()
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(full), counts, full, BLOCK
    )


def calls_of(case: Case, names: list[str]) -> dict[str, tuple[Call, float]]:
    """name -> (call, share of the blocks it computes) of all kernels that run here, each run once.

    names: those wanted
    """
    torch._dynamo.reset()  # else the next length is compiled for any length
    makers = {"flash": flash, "ours": ours, "hopper": hopper, "cudnn": cudnn, "xformers": xformers}
    makers |= {name: lambda case, name=name: flex(case, name) for name in FLEX}
    calls = {}
    for maker, make in makers.items():
        if maker in FLEX and maker not in names:
            continue
        try:
            for name, call, share in make(case):
                if name in names:
                    call()
                    calls[name] = (call, share)
            torch.cuda.synchronize()
        except Exception as error:  # of other libraries, of any kind
            print(f"{maker} does not run: {error!r:.300}", file=sys.stderr)
    return calls


def milliseconds(call: Call, repeat: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeat


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Each call's milliseconds in each round; short ones are repeated within a round."""
    names = list(calls)
    repeat = {name: min(20, int(4 / milliseconds(call, 2)) + 1) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn * len(names) // rounds
        for name in names[first:] + names[:first]:
            times[name].append(milliseconds(calls[name], repeat[name]))
    return times


def lines_of(case: Case, names: list[str], rounds: int) -> Iterator[dict[str, object]]:
    calls = calls_of(case, names)
    times = measure({name: call for name, (call, _) in calls.items()}, rounds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    heads, kv_heads, dim = SHAPES[case.shape]
    for name, (_, share) in calls.items():
        ms = medians[name]
        operations = 4 * case.length**2 * heads * dim * share
        yield {
            "bench": "attention",
            "kernel": name,
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "shape": case.shape,
            "tokens": case.length,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": dim,
            "lists": case.lists,
            "asked": case.density,
            "density": round(share, 4),
            "rounds": rounds,
            "ms": round(ms, 4),
            "spread": round(max(times[name]) - min(times[name]), 4),
            "tflops": round(operations / ms / 1e9, 1),
            "ratio_to_fa3": round(ms / medians["fa3_dense"], 4) if "fa3_dense" in medians else None,
            "ratio_to_floor": round(ms * PEAK / operations / 1e3, 3) if operations else None,
        }


KERNELS = [
    *("fa3_dense", "fa2_dense", "ours_gluon", "ours_triton", "ours_dense"),
    *("block_scores", "select_blocks", "cudnn_dense", "xformers_dense", *FLEX),
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llada"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--density", type=float, nargs="+", default=[0.3])
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=["random"])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="LLaDA's shape, 30%%, in a minute")
    args = parser.parse_args()
    if args.quick:
        kernels = [name for name in args.kernels if name not in SLOW]
        vars(args).update(QUICK, rounds=5, kernels=kernels)
    return args


def main() -> None:
    args = parse()
    for case in itertools.product(args.shape, args.lengths, args.density, args.lists):
        torch.manual_seed(0)
        for line in lines_of(Case(*case), args.kernels, args.rounds):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
