# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A step of the loop that LLaDA's and SparseD's authors publish, in plain PyTorch, batch 1.

    python benchmarks/bench_reference.py --lengths 16384 65536 >> reference.jsonl

Their networks and loop written anew from their papers and files (LLaDA/generate.py,
SparseD/models/modeling_llada.py): attention through SDPA (FlashAttention 2) in dense steps and
FlexAttention over random lists of `select` of the blocks in sparse ones, logits and a softmax for
every row of the sequence. How they record the pattern is not timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

from dummies import MODELS, SELECT, peak_bytes, versions, wait  # puts examples/ on the path

# isort: split
import torch
from needle.network import Attention, Network, Shape, full_attention
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK, ROUNDS = 128, 3
THETA = 500000.0


def build(num_layers: int | None, device: str) -> Network:
    """LLaDA-8B with random weights, in bfloat16."""
    sizes = MODELS["llada"][1]
    shape = Shape(
        vocab_size=sizes.vocab_size,
        n_layers=num_layers or sizes.n_layers,
        n_heads=sizes.n_heads,
        d_model=sizes.d_model,
        mlp_hidden_size=sizes.mlp_hidden_size,
        rope_theta=THETA,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        network = Network(shape)
    torch.set_default_dtype(torch.float32)
    return network.requires_grad_(False)


def random_blocks(heads: int, length: int, device: str) -> BlockMask:
    """Full 128 x 128 blocks, `select` of each row, the same for all layers."""
    num_blocks = length // BLOCK
    keep = int(num_blocks * SELECT) + 1
    picks = torch.rand(1, heads, num_blocks, num_blocks, device=device).topk(keep).indices
    indices = torch.zeros(1, heads, num_blocks, num_blocks, dtype=torch.int32, device=device)
    indices[..., :keep] = picks.sort().values
    counts = torch.full((1, heads, num_blocks), keep, dtype=torch.int32, device=device)
    nothing = torch.zeros_like(counts), torch.zeros_like(indices)
    return BlockMask.from_kv_blocks(*nothing, counts, indices, BLOCK)


def sparse_attention(length: int, heads: int, device: str) -> Attention:
    attend = torch.compile(flex_attention) if device == "cuda" else flex_attention
    call = partial(attend, block_mask=random_blocks(heads, length, device))
    return lambda layer, q, k, v: call(q, k, v)


def denoise_once(network: Network, tokens: Tensor, attend: Attention) -> Tensor:
    """Tokens and how sure they are, for every row, as the authors' loop computes them."""
    logits = network(tokens, attend=attend)
    choice = logits.argmax(-1)
    return torch.gather(torch.softmax(logits, -1), -1, choice[..., None])


def seconds(call: Callable[[], Tensor]) -> list[float]:
    call()
    times = []
    for _ in range(ROUNDS):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = build(args.layers, device)
    for length in args.lengths:
        tokens = torch.randint(1000, (1, length), device=device)
        phases = {
            "dense": full_attention,
            "sparse": sparse_attention(length, network.shape.n_heads, device),
        }
        for phase, attend in phases.items():
            times = seconds(partial(denoise_once, network, tokens, attend))
            line = {
                "bench": "reference",
                "model": "llada",
                **versions(),
                "tokens": length,
                "batch": 1,
                "select": SELECT,
                "phase": phase,
                "seconds": statistics.median(times),
                "spread": max(times) - min(times),
                "peak_bytes": peak_bytes(),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
