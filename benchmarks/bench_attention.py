# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Our attention kernels beside FlashAttention 3 and FlexAttention, one layer, in one run.

    python benchmarks/bench_attention.py --lengths 4096 16384 65536 >> results/attention.jsonl

Lists are random, the same for ours and FlexAttention (default options, a BlockMask of full
128 x 128 blocks). Kernels take turns; medians of `--rounds`. TFLOP/s count kept blocks only.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
import triton
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from vllm.v1.attention.backends import fa_utils

from sparsed_vllm.kernels import api

SHAPES = {"llada": (32, 32, 128), "dream": (28, 4, 128)}
BLOCK = 128


def random_lists(heads: int, blocks: int, keep: int) -> torch.Tensor:
    """Ascending key-block ids, int64 [blocks, heads, keep]."""
    picks = torch.rand(blocks, heads, blocks, device="cuda").topk(keep, dim=-1).indices
    return picks.sort(dim=-1).values


def kernels(shape: str, length: int, density: float) -> dict[str, tuple[Callable, float]]:
    """What is timed: name -> (call, share of the blocks it computes)."""
    heads, kv_heads, dim = SHAPES[shape]
    q = torch.randn(length, heads, dim, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(length, kv_heads, dim, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    scale, num_blocks = dim**-0.5, length // BLOCK
    keep = max(1, round(num_blocks * density))
    lists = random_lists(heads, num_blocks, keep)
    blocks = api.QueryBlocks.of([api.Span(0, length, length - BLOCK, density)], BLOCK, "cuda")
    kept, rows = lists.to(torch.int16), torch.arange(num_blocks, device="cuda")
    num_kept = torch.full((num_blocks, heads), keep, dtype=torch.int32, device="cuda")
    cu = torch.tensor([0, length], dtype=torch.int32, device="cuda")

    def flash() -> tuple:
        return fa_utils.flash_attn_varlen_func(
            *(q, k, v),
            max_seqlen_q=length,
            cu_seqlens_q=cu,
            max_seqlen_k=length,
            cu_seqlens_k=cu,
            softmax_scale=scale,
            causal=False,
            return_softmax_lse=True,
            fa_version=fa_utils.get_flash_attn_version(),
        )

    lse = flash()[1].contiguous()
    share = keep / num_blocks
    calls = {
        "fa3_dense": (flash, 1.0),
        "ours_dense": (lambda: api.dense_attention(q, k, v, blocks, scale=scale), 1.0),
        "ours_sparse": (
            lambda: api.block_sparse_attention(
                *(q, k, v, blocks, kept, num_kept, rows), scale=scale
            ),
            share,
        ),
        "flex_sparse": (flex(q, k, v, lists, keep, scale), share),
        "block_scores": (lambda: api.block_scores(q, k, lse, blocks, scale=scale), 0.5),
    }
    scores = api.block_scores(q, k, lse, blocks, scale=scale)
    table = torch.empty(num_blocks, heads, blocks.most_kept, dtype=torch.int16, device="cuda")
    calls["select_blocks"] = (
        lambda: api.select_blocks(*scores, blocks, table, num_kept.clone(), rows),
        0.0,
    )
    return calls


def flex(q, k, v, lists, keep, scale) -> Callable:
    """FlexAttention over the same lists."""
    full = lists.permute(1, 0, 2)[None].int().contiguous()  # [1, heads, blocks, keep]
    num_blocks = full.shape[2]
    padded = torch.nn.functional.pad(full, (0, num_blocks - keep))
    counts = torch.full(full.shape[:3], keep, dtype=torch.int32, device="cuda")
    none = torch.zeros_like(counts)
    mask = BlockMask.from_kv_blocks(none, torch.zeros_like(padded), counts, padded, BLOCK)
    qkv = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
    compiled = torch.compile(flex_attention)
    gqa = q.shape[1] != k.shape[1]
    return lambda: compiled(*qkv, block_mask=mask, scale=scale, enable_gqa=gqa)


def milliseconds(call: Callable) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llada")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    heads, kv_heads, dim = SHAPES[args.shape]
    for length in args.lengths:
        calls = kernels(args.shape, length, args.density)
        for call, _ in calls.values():
            call()
        times = {name: [] for name in calls}
        for _ in range(args.rounds):
            for name, (call, _) in calls.items():
                times[name].append(milliseconds(call))
        fa3 = statistics.median(times["fa3_dense"])
        for name, (_, share) in calls.items():
            ms = statistics.median(times[name])
            line = {
                "bench": "attention",
                "kernel": name,
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "tokens": length,
                "heads": heads,
                "kv_heads": kv_heads,
                "head_dim": dim,
                "density": share,
                "ms": round(ms, 4),
                "spread": round(max(times[name]) - min(times[name]), 4),
                "tflops": round(4 * length**2 * heads * dim * share / ms / 1e9, 1),
                "ratio_to_fa3": round(ms / fa3, 4),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
