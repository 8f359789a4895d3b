# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Seconds a step of LLaDA's and SparseD's published PyTorch path, on random weights.

    python benchmarks/bench_reference.py --lengths 16384 65536 >> results/reference.jsonl

Their networks and loop written anew from their papers and files (LLaDA/generate.py,
SparseD/models/modeling_llada.py): attention through SDPA (FlashAttention 2) in dense steps and
FlexAttention over random lists of `select` of the blocks in sparse ones, logits and a softmax for
every row of the sequence, in the model's bfloat16. Generations are added up from these steps; how
theirs records the pattern is not timed, and counts as a dense step.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from attention.timing import spread
from budget import Budget
from generation.dummies import MODELS, SELECT, Tables, print_line  # puts examples/ on the path
from generation.machine import forget_peak, guarded, wait
from generation.steps import Load, project
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# isort: split
from needle.network import Attention, Network, Shape, full_attention

BLOCK = 128
THETA = 500000.0
NEW_TOKENS = 128


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


def dense_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 2, whatever else this torch would rather take."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return full_attention(layer, q, k, v)


def sparse_attention(length: int, heads: int, device: str) -> Attention:
    """Compiled for this length alone: a second one would be compiled for any length."""
    torch._dynamo.reset()
    attend = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
    call = partial(attend, block_mask=random_blocks(heads, length, device))
    return lambda layer, q, k, v: call(q, k, v)


@torch.no_grad()
def denoise_once(network: Network, tokens: Tensor, attend: Attention) -> tuple[Tensor, Tensor]:
    """Tokens and how sure they are, for every row, as the authors' loop computes them."""
    logits = network(tokens, attend=attend)
    choice = logits.argmax(-1)
    return choice, torch.softmax(logits, -1).gather(-1, choice[..., None])


def seconds(call: Callable[[], object], rounds: int) -> list[float]:
    call()
    times = []
    for _ in range(rounds):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - begin)
    return times


def measure(args: argparse.Namespace, network: Network, load: Load, device: str) -> None:
    """A line for each phase, and for each mode and T a line with what they add up to."""
    report = partial(print_line, "reference", "llada", args.layers, **load.sizes)
    tokens = torch.randint(1000, (1, load.length), device=device)
    kinds = {
        "dense": dense_attention,
        "sparse": sparse_attention(load.length, network.shape.n_heads, device),
    }
    step = {}
    for phase, attend in kinds.items():
        forget_peak()
        times = seconds(partial(denoise_once, network, tokens, attend), args.rounds)
        step[phase] = statistics.median(times)
        report(phase=phase, seconds=step[phase], spread=spread(times), count=len(times))
    step["recording"] = step["dense"]
    for steps, mode in product(args.steps, kinds):
        total = project(step, steps, load.tables.skip if mode == "sparse" else None)
        numbers = {"seconds": total, "tokens_per_second": NEW_TOKENS / total}
        report(phase="generation", mode=mode, steps=steps, **numbers, projected=True)
    gc.collect()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    add("--steps", type=int, nargs="+", default=[128, 1024], help="T of a generation")
    add("--layers", type=int, help="fewer than the model has")
    add("--rounds", type=int, default=3)
    add("--budget", type=float, help="seconds, without the making of the network")
    args = parser.parse_args(argv)
    for length in args.lengths:
        if length < 2 * BLOCK or length % BLOCK:
            parser.error(f"--lengths must be multiples of {BLOCK}, two at least, got {length}.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, budget = build(args.layers, device), Budget(args.budget)
    for load in (Load(length, NEW_TOKENS, tables=Tables(BLOCK, BLOCK)) for length in args.lengths):
        call = partial(guarded, partial(measure, args, network, load, device), load.length)
        budget.run(f"{load.length} tokens", load.work, call)


if __name__ == "__main__":
    main()
