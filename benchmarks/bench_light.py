# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""One layer of a light step: few rows over keys in pages, one JSON line for each kernel and size.

    python benchmarks/bench_light.py >> benchmarks/results/light.jsonl

Kernels take turns. Each call is a replayed CUDA graph, so that no launch is timed. `gb_per_s`
counts keys and values once (`lists`: once for each list; `mass`: keys; `write`: what is read and
written), `tflops` two products of all rows and keys (`mass`: one). `fa` is vLLM's FlashAttention
over the same pages as this engine calls it, `fa_free` may split keys as it likes. `ours/R.K.W.S.P`
has programs of R rows and K keys a step, W warps, S stages, and P programs a sequence. `lists`
attends to `--density` of the blocks, `mass` is of up to 128 rows. Before anything is timed, small
cases are compared with the twins; a wrong kernel ends the run.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import triton
from attention.timing import measure
from budget import Budget, note
from torch import Tensor

from sparsed_vllm.kernels import api, reference
from sparsed_vllm.kernels.paged_attention import paged_attention
from sparsed_vllm.kernels.splits import SplitTiles
from sparsed_vllm.kernels.token_mass import MassTiles, token_mass

SHAPES = {"llada": (32, 32, 128), "dream": (28, 4, 128)}
"""Heads, key heads and head size."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = 128  # also the sparse block size
TILES = (
    *("128.128.8.3.264", "128.128.8.3.132", "128.128.8.4.132", "128.64.8.3.264"),
    *("64.64.4.3.264", "64.64.4.4.264", "64.128.4.3.132"),
)
MASS_TILES = ("128.64.4.3", "128.128.8.3", "64.64.4.3", "64.128.4.3")

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A sequence of `tokens` of which `rows` are computed; its pages lie in random order."""

    shape: str
    tokens: int
    rows: int
    density: float

    @property
    def scale(self) -> float:
        return float(SHAPES[self.shape][2] ** -0.5)

    @property
    def num_pages(self) -> int:
        return api.num_blocks(self.tokens, api.PAGE)

    @cached_property
    def q(self) -> Tensor:
        heads, _, dim = SHAPES[self.shape]
        return torch.randn(self.rows, heads, dim, dtype=torch.bfloat16, device=DEVICE)

    @cached_property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [num_pages, PAGE, num_kv_heads, head_dim] each."""
        _, heads, dim = SHAPES[self.shape]
        shape = (self.num_pages, 2, api.PAGE, heads, dim)
        whole = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
        return whole[:, 0], whole[:, 1]

    @cached_property
    def pages(self) -> Tensor:
        return torch.randperm(self.num_pages, device=DEVICE).int()[None]

    def layout(self, tile: int) -> api.BatchLayout:
        return api.BatchLayout.of(
            tile,
            DEVICE,
            query_starts=[0],
            num_rows=[self.rows],
            first_rows=[0],
            key_starts=[0],
            key_lens=[self.tokens],
            page_rows=[0],
        )

    @cached_property
    def tables(self) -> api.BlockTables:
        """Equally many random blocks for each row of blocks, ascending."""
        shape = (self.num_pages, 1, SHAPES[self.shape][0], self.num_pages)
        keep = max(1, round(self.num_pages * self.density))
        blocks = api.num_blocks(self.rows, TILE)
        picks = torch.rand((blocks, *shape[1:]), device=DEVICE).topk(keep, dim=-1).indices
        kept = torch.zeros(*shape[:3], keep, dtype=torch.int16, device=DEVICE)
        kept[self.pages[0, :blocks].long()] = picks.sort(-1).values.to(torch.int16)
        return api.BlockTables(kept, torch.full_like(kept[..., 0], keep), self.pages)

    @cached_property
    def lse(self) -> Tensor:
        of = (self.q, *self.halves, self.layout(TILE), self.pages)
        return api.paged_attention(*of, scale=self.scale, return_lse=True)[1]

    def mass(self) -> dict[str, Tensor]:
        return {
            "weights": torch.ones(self.rows, device=DEVICE),
            "slots": torch.zeros(1, dtype=torch.int64, device=DEVICE),
            "mass": torch.zeros(1, self.tokens, device=DEVICE),
        }


def ours(case: Case, name: str = "") -> Call:
    """name: R.K.W.S.P; none: as the engine calls it"""
    of = (case.q, *case.halves, case.layout(64 if case.rows <= 64 else TILE), case.pages)
    options = {"scale": case.scale, "return_lse": True}
    if not name:
        return partial(api.paged_attention, *of, **options)
    return partial(paged_attention, *of, **options, tiles=SplitTiles(*map(int, name.split("."))))


def lists(case: Case) -> Call:
    of = (case.q, *case.halves, case.layout(TILE), case.tables)
    return partial(api.paged_block_sparse_attention, *of, scale=case.scale, return_lse=True)


def mass(case: Case, name: str = "") -> Call:
    """Of up to 128 rows, those of a canvas."""
    few = Case(case.shape, case.tokens, min(case.rows, 128), case.density)
    given = few.mass()
    of = (case.q[: few.rows], case.halves[0], case.lse[:, : few.rows], few.layout(TILE), case.pages)
    if not name:
        return partial(api.token_mass, *of, **given, scale=case.scale)
    tiles = MassTiles(*map(int, name.split(".")))
    return partial(token_mass, *of, **given, scale=case.scale, tiles=tiles)


def write(case: Case) -> Call:
    _, heads, dim = SHAPES[case.shape]
    k, v = torch.randn(2, case.rows, heads, dim, dtype=torch.bfloat16, device=DEVICE)
    places = torch.randperm(case.tokens, device=DEVICE)[: case.rows]
    return partial(api.write_pages, k, v, *case.halves, places // api.PAGE, places % api.PAGE)


def flash(case: Case, num_splits: int) -> Call:
    from vllm.v1.attention.backends import fa_utils

    return partial(
        fa_utils.flash_attn_varlen_func,
        case.q,
        *case.halves,
        cu_seqlens_q=torch.tensor([0, case.rows], dtype=torch.int32, device=DEVICE),
        max_seqlen_q=case.rows,
        seqused_k=torch.tensor([case.tokens], dtype=torch.int32, device=DEVICE),
        max_seqlen_k=case.tokens,
        block_table=case.pages,
        softmax_scale=case.scale,
        causal=False,
        return_softmax_lse=True,
        fa_version=fa_utils.get_flash_attn_version(),
        num_splits=num_splits,
    )


def contenders(case: Case, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Call]]]:
    yield "ours", partial(ours, case)
    yield "fa", partial(flash, case, 1)
    yield "fa_free", partial(flash, case, 0)
    yield "lists", partial(lists, case)
    yield "mass", partial(mass, case)
    yield "write", partial(write, case)
    if args.sweep and case.rows <= 256:
        yield from ((f"ours/{name}", partial(ours, case, name)) for name in TILES)
        yield from ((f"mass/{name}", partial(mass, case, name)) for name in MASS_TILES)


def captured(call: Call) -> Call:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, call: Call) -> None:
    """call: what was captured, whose tensors the graph reads"""
    graph.replay()


def run_case(case: Case, args: argparse.Namespace) -> None:
    calls: dict[str, Call] = {}
    for name, prepare in contenders(case, args):
        try:
            calls[name] = captured(prepare())
        except Exception as error:  # a yardstick that is not installed, a cut that has no room
            note(f"{name} does not run on {case}: {' '.join(repr(error).split()):.200}")
    for name, times in measure(calls, args.rounds).items():
        print(json.dumps(line_of(case, name, times)), flush=True)


def line_of(case: Case, name: str, times: list[float]) -> dict[str, object]:
    """times: milliseconds of each round"""
    heads, kv_heads, dim = SHAPES[case.shape]
    seconds, rows = statistics.median(times) / 1e3, case.rows
    kind = name.partition("/")[0]
    half = case.tokens * kv_heads * dim * 2
    product = 2 * rows * case.tokens * heads * dim
    num_bytes, operations = 2 * half, 2 * product
    if kind == "mass":
        num_bytes, operations, rows = half, product * min(rows, 128) // rows, min(rows, 128)
    elif kind == "write":
        num_bytes, operations = 4 * rows * kv_heads * dim * 2, 0
    elif kind == "lists":
        keep = case.tables.kept.shape[3]
        num_bytes = api.num_blocks(rows, TILE) * heads * keep * TILE * dim * 4
        operations = 2 * product * keep // case.num_pages
    return {
        "bench": "light",
        "kernel": name,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shape": case.shape,
        "tokens": case.tokens,
        "rows": rows,
        "density": case.density if kind == "lists" else None,
        "seconds": seconds,
        "gb_per_s": round(num_bytes / seconds / 1e9, 1),
        "tflops": round(operations / seconds / 1e12, 1),
    }


def verify(shape: str) -> None:
    """Small cases against their twins, in float32 from the same numbers."""
    for tokens, rows in ((1, 1), (1000, 32), (2500, 150)):
        case = Case(shape, tokens, rows, 0.5)
        q, (keys, values) = case.q, case.halves
        slow = (q.float(), keys.float(), values.float())
        for kernel, where in (
            (api.paged_attention, case.pages),
            (api.paged_block_sparse_attention, case.tables),
        ):
            options = {"scale": case.scale, "return_lse": True}
            found = kernel(q, keys, values, case.layout(TILE), where, **options)
            twin = getattr(reference, kernel.__name__)
            right = twin(*slow, case.layout(TILE), where, **options)
            for one, other in zip(found, right, strict=True):
                torch.testing.assert_close(one.float(), other, rtol=2e-2, atol=2e-2)
        given, expected = case.mass(), case.mass()
        of = (case.lse, case.layout(TILE), case.pages)
        api.token_mass(q, keys, *of, **given, scale=case.scale)
        reference.token_mass(slow[0], slow[1], *of, **expected, scale=case.scale)
        torch.testing.assert_close(given["mass"], expected["mass"], rtol=1e-2, atol=1e-4)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--tokens", type=int, nargs="+", default=[1024, 8192, 32768, 65536])
    add("--rows", type=int, nargs="+", default=[32, 64, 128, 256, 783, 1439])
    add("--density", type=float, default=0.3)
    add("--rounds", type=int, default=5)
    add("--sweep", action="store_true", help="also time other ways to cut, up to 256 rows")
    add("--budget", type=float, help="seconds: cases that would take longer are left out")
    args = parser.parse_args(argv)
    if problem := why_not(args):
        parser.error(problem)
    return args


def why_not(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, in one line."""
    for name in ("tokens", "rows"):
        for number in getattr(args, name):
            if number < 1:
                return f"--{name} must be at least 1, got {number}."
    if not 0 < args.density <= 1:
        return f"--density must be over 0, up to 1, got {args.density}."
    if args.rounds < 1:
        return f"--rounds must be at least 1, got {args.rounds}."
    if args.budget is not None and args.budget <= 0:
        return f"--budget must be over 0 seconds, got {args.budget}."
    return None


def main(args: argparse.Namespace) -> None:
    budget = Budget(args.budget)
    for shape in args.shape:
        verify(shape)
    for shape, tokens, rows in itertools.product(args.shape, args.tokens, args.rows):
        if rows > tokens:
            continue
        torch.manual_seed(0)
        case = Case(shape, tokens, rows, args.density)
        budget.run(str(case), float(tokens * rows), partial(run_case, case, args))


if __name__ == "__main__":
    arguments = parse()
    if DEVICE != "cuda":
        sys.exit("bench_light.py times kernels on an NVIDIA GPU; there is none here.")
    main(arguments)
