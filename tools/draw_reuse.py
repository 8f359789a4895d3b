# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Draws docs/reuse.svg: which tokens of a sequence the steps of a request compute.

python tools/draw_reuse.py > docs/reuse.svg
"""

from collections.abc import Iterable

from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.reuse import Reuse
from sparsed_vllm.steps import Plan, Source, Step

PROMPT, CANVAS, STEPS = 36, 8, 6  # tokens, tokens, steps
SHARE = 0.08  # 3 of 36: far more than is needed, to be seen
CHOSEN = ((4, 5, 21), (5, 21, 30), (5, 12, 30), (12, 13, 30), (13, 22, 31))
"""The tokens of the prompt that light steps choose; made up."""

CELL, GAP, LEFT, TOP = 13, 2, 70, 44  # pixels
COMPUTED, KEPT, PICKED = "#1f4e79", "#dfe6ee", "#d9730d"


def picture() -> str:
    """The file: exact steps above, light ones below."""
    params = DenoisingParams(CANVAS, STEPS, CANVAS, "low_confidence")
    exact = Plan(params, None, PROMPT)
    light = Plan(params, None, PROMPT, reuse=Reuse(SHARE))
    below = TOP + STEPS * (CELL + GAP) + 58
    width = LEFT + (PROMPT + CANVAS) * (CELL + GAP) + 12 + 10
    height = below + STEPS * (CELL + GAP) + 44
    parts = [
        *_grid(exact, TOP, "Exact: every step computes all tokens"),
        *_grid(light, below, "Selective refresh: all tokens once, then the canvas and a few more"),
        *_legend(height - 18),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    head += 'font-family="sans-serif" font-size="12" fill="#222">'
    paper = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([head, paper, *parts, "</svg>"]) + "\n"


def _grid(plan: Plan, top: int, title: str) -> Iterable[str]:
    """A row of cells for each step, prompt and canvas a little apart."""
    yield _text(LEFT, top - 26, title, "bold")
    yield _text(LEFT, top - 8, "prompt")
    yield _text(_x(PROMPT), top - 8, "canvas")
    for number in range(plan.num_steps):
        y = top + number * (CELL + GAP)
        yield _text(10, y + CELL - 2, f"step {number}")
        colors = [_color(plan.at(number), number, place) for place in range(plan.length)]
        for color in dict.fromkeys(colors):
            yield _cells(
                [_x(place) for place in range(plan.length) if colors[place] == color], y, color
            )


def _color(step: Step, number: int, place: int) -> str:
    if place >= step.first_row:
        return COMPUTED
    assert step.source is Source.PAGES and step.num_chosen == len(CHOSEN[number - 1])
    return PICKED if place in CHOSEN[number - 1] else KEPT


def _legend(y: int) -> Iterable[str]:
    labels = ((COMPUTED, "computed"), (PICKED, "chosen by attention, computed"))
    labels += ((KEPT, "keys and values read from pages"),)
    x = LEFT
    for color, label in labels:
        yield _cells([x], y - CELL + 2, color)
        yield _text(x + CELL + 6, y, label)
        x += 40 + 7 * len(label)


def _x(place: int) -> int:
    return LEFT + place * (CELL + GAP) + 12 * (place >= PROMPT)


def _cells(lefts: Iterable[int], y: int, color: str) -> str:
    squares = "".join(f"M{x} {y}h{CELL}v{CELL}h-{CELL}z" for x in lefts)
    return f'<path d="{squares}" fill="{color}"/>'


def _text(x: int, y: int, text: str, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-weight="{weight}">{text}</text>'


if __name__ == "__main__":
    print(picture(), end="")
