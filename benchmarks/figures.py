# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What the plots share: figures without a display, and curves that tell apart in grey as well."""

from pathlib import Path
from typing import Any

MARKERS = "osDv^P*X<>"


def subplots(columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure and its panels, side by side."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, squeeze=False, layout="constrained", **options)


def draw_curve(panel: Any, points: dict[int, float], label: str, line: str, number: int) -> None:
    """Over tokens.  line: matplotlib's dashes;  number: which marker and colour"""
    look = {"linestyle": line, "marker": MARKERS[number], "color": f"C{number}", "markersize": 6}
    look |= {"linewidth": 2.2 if line == "-" else 1.2, "label": label}
    look |= {"markerfacecolor": "white"} if line == ":" else {}
    panel.plot(*zip(*sorted(points.items()), strict=True), **look)


def finish_panel(panel: Any, **options: Any) -> None:
    panel.set(xlabel="tokens", **options)
    panel.set_xscale("log", base=2)
    panel.grid(alpha=0.3)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
