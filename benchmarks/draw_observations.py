# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The three observations of SparseD (arXiv 2509.24014), drawn from the needle model.

    pip install matplotlib && python benchmarks/draw_observations.py --out docs

attention.png: heads attend in ways of their own. similarity.png: a head's kept blocks stay nearly
the same over the denoising steps. damage.png: what is lost where some steps in a row are sparse.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import matplotlib

matplotlib.use("Agg")  # no display is needed

import torch
from matplotlib import pyplot
from needle import checkpoint
from needle.decoding import denoise
from needle.network import Attention, Network, full_attention
from needle.tasks import TASKS
from PIL import Image
from quality.answers import load
from quality.attention import SparseAttention
from quality.methods import Method
from quality.questions import Question, draw, mark
from torch import Tensor

CANVAS, STEPS, BLOCK = 32, 32, 16  # tokens, steps, tokens
SPARSE_STEPS = 8  # that damage.png makes sparse at once
SELECTS = (0.3, 0.1)
LINES = (("black", "-", "o"), ("dimgray", "--", "s"))  # readable in grey


class Watch:
    """Dense attention that hands every layer's q and k to `see(step, layer, q, k)`."""

    def __init__(self, see: Callable[[int, int, Tensor, Tensor], None]) -> None:
        self.see = see

    def __call__(self, step: int) -> Attention:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.see(step, layer, q, k)
            return full_attention(layer, q, k, v)

        return attend


def prompts_of(network: Network, length: int, samples: int) -> tuple[list[Question], Tensor]:
    """Questions of all tasks, and their prompts int64 [questions, length]."""
    questions = [draw(task, length, CANVAS, i) for i in range(samples) for task in TASKS]
    device = next(network.parameters()).device
    return questions, torch.tensor([question.prompt for question in questions], device=device)


def draw_attention(network: Network, length: int, file: Path) -> None:
    """Where eight heads look halfway through the steps of one question."""
    maps: dict[tuple[int, int], Tensor] = {}

    def see(step: int, layer: int, q: Tensor, k: Tensor) -> None:
        if step == STEPS // 2:
            weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[0].float().cpu()
            for head, seen in enumerate(weights):
                maps[layer, head] = seen

    _, prompts = prompts_of(network, length, 1)
    denoise(network, prompts[1:2], CANVAS, STEPS, Watch(see))  # multikey
    shown = most_different(maps, 8)
    figure, axes = grid(2, 4)
    for axis, (layer, head) in zip(axes.flat, shown, strict=True):
        axis.imshow(pooled(maps[layer, head]), cmap="gray_r", vmin=-4, vmax=0)
        axis.set_title(f"layer {layer}, head {head}", fontsize=9)
        axis.tick_params(labelsize=7)
    figure.supxlabel(f"key, in groups of {POOL} tokens (the answer is at the end)", fontsize=9)
    figure.supylabel("query", fontsize=9)
    save(figure, file)


POOL = 4  # tokens of one pixel


def pooled(weights: Tensor) -> Tensor:
    """log10 of the largest weight of each pixel"""
    return torch.nn.functional.max_pool2d(weights[None], POOL, ceil_mode=True)[0].log10()


def most_different(maps: dict[tuple[int, int], Tensor], count: int) -> list[tuple[int, int]]:
    """Heads each of which overlaps least with those that were picked before."""
    picked = [max(maps, key=lambda key: float(maps[key].amax(-1).mean()))]
    while len(picked) < count:
        picked.append(min(maps, key=lambda key: max(overlap(maps[key], maps[p]) for p in picked)))
    return sorted(picked)


def overlap(a: Tensor, b: Tensor) -> float:
    """The mass that two maps share, 0 to 1."""
    return float(torch.minimum(a, b).sum(-1).mean())


def draw_similarity(network: Network, length: int, samples: int, file: Path) -> None:
    """How much of what a head keeps at one step it keeps at another, layer by layer."""
    kept: dict[tuple[int, int], Tensor] = {}
    _, prompts = prompts_of(network, length, samples)
    attention = sparse(Method("recorded", ""), len(prompts), length, prompts.device)

    def see(step: int, layer: int, q: Tensor, k: Tensor) -> None:
        kept[step, layer] = as_mask(attention, q, k)

    denoise(network, prompts, CANVAS, STEPS, Watch(see))
    layers = network.shape.n_layers
    steps = range(0, STEPS, 2)
    figure, axes = grid(2, layers // 2)
    for layer, axis in enumerate(axes.flat):
        table = [[same(kept[a, layer], kept[b, layer]) for a in steps] for b in steps]
        edges = (0, STEPS, 0, STEPS)
        image = axis.imshow(table, cmap="gray", vmin=0.5, vmax=1, origin="lower", extent=edges)
        axis.set_title(f"layer {layer}: least {min(map(min, table)):.2f}", fontsize=9)
        axis.tick_params(labelsize=7)
    figure.supxlabel("denoising step", fontsize=9)
    figure.supylabel("denoising step", fontsize=9)
    figure.colorbar(image, ax=axes, label="kept blocks in common", shrink=0.8)
    save(figure, file)


def sparse(method: Method, batch: int, length: int, device: torch.device) -> SparseAttention:
    sizes = {"prompt": length, "canvas": CANVAS, "steps": STEPS, "block_size": BLOCK}
    return SparseAttention(method, batch=batch, device=device, **sizes)


def as_mask(attention: SparseAttention, q: Tensor, k: Tensor) -> Tensor:
    """bool [blocks, heads, key blocks], what SparseD would keep of this step's q and k"""
    attention.record(0, q, k)
    kept, num_kept = attention.lists(0)
    ids = torch.arange(kept.shape[2], device=kept.device)
    width = attention.layout.max_key_blocks
    places = kept.long().where(ids < num_kept[..., None], width)
    mask = torch.zeros(*kept.shape[:2], width + 1, dtype=torch.bool, device=kept.device)
    return mask.scatter_(2, places, True)[..., :width]


def same(a: Tensor, b: Tensor) -> float:
    """Blocks that both keep, of those that either keeps."""
    return float((a & b).sum() / (a | b).sum())


class SparseSpell:
    """Dense steps, but for some in a row that use the pattern of the step before them."""

    def __init__(self, inner: SparseAttention, first: int) -> None:
        self.inner, self.first = inner, first

    def __call__(self, step: int) -> Attention:
        if self.first <= step < self.first + SPARSE_STEPS:
            return self.inner.renewing if step == self.first else self.inner.sparse
        return full_attention


def draw_damage(network: Network, length: int, samples: int, file: Path) -> None:
    """Right tokens by where the sparse steps lie."""
    questions, prompts = prompts_of(network, length, samples)
    firsts = range(0, STEPS - SPARSE_STEPS + 1, SPARSE_STEPS)
    figure, axis = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    for select, (color, line, marker) in zip(SELECTS, LINES, strict=True):
        shares = []
        for first in firsts:
            method = Method("spell", "", select=select)
            inner = sparse(method, len(questions), length, prompts.device)
            given = denoise(network, prompts, CANVAS, STEPS, SparseSpell(inner, first)).tolist()
            shares.append(right(questions, given))
        axis.plot(firsts, shares, line, color=color, marker=marker, label=f"select {select}")
    dense = right(questions, denoise(network, prompts, CANVAS, STEPS).tolist())
    axis.axhline(dense, color="black", linewidth=0.8, linestyle=":", label="dense")
    axis.set_xticks(list(firsts), [f"{first} to {first + SPARSE_STEPS - 1}" for first in firsts])
    axis.set_xlabel("steps that run sparse, all others dense")
    axis.set_ylabel("right tokens, %")
    axis.legend(frameon=False, fontsize=9)
    save(figure, file)


def right(questions: list[Question], given: list[list[int]]) -> float:
    marks = [mark(question, tokens) for question, tokens in zip(questions, given, strict=True)]
    return 100 * sum(one.tokens for one in marks) / len(marks)


def grid(rows: int, columns: int) -> tuple[pyplot.Figure, Any]:
    size = {"figsize": (9, 4.9), "layout": "constrained"}
    return pyplot.subplots(rows, columns, sharex=True, sharey=True, **size)


def save(figure: pyplot.Figure, file: Path) -> None:
    """In few shades of grey, which keeps the file small."""
    figure.savefig(file, dpi=100)
    shades = [round(shade / 255 * 31) * 255 // 31 for shade in range(256)]
    Image.open(file).convert("L").point(shades).save(file, optimize=True)
    print(file, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=checkpoint.SHIPPED)
    parser.add_argument("--out", type=Path, default=checkpoint.SHIPPED.parents[2] / "docs")
    parser.add_argument("--length", type=int, default=384, help="tokens of a prompt")
    parser.add_argument("--samples", type=int, default=2, help="questions of each task")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    network = load(args.model, torch.device(args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    draw_attention(network, args.length, args.out / "attention.png")
    draw_similarity(network, args.length, 1, args.out / "similarity.png")
    draw_damage(network, args.length, args.samples, args.out / "damage.png")


if __name__ == "__main__":
    main()
