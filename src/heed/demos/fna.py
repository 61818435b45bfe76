"""Neighborhood attention on a photograph: which tokens a query sees, what the border does, and what it saves."""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from heed.demos.registry import Figures, demos, photograph
from heed.engine.attend import attend
from heed.engine.pattern import Pattern
from heed.engine.patterns import Full, Neighborhood

_GRID = (24, 36)
_CELL = 14  # pixels per token
# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#D55E00", "#0072B2", "#009E73")
_QUERIES = ((1, 2), (9, 14), (21, 33))
_PANELS = {
    "Window 7 x 7. At the border it slides inward\nand keeps its 49 keys": Neighborhood(_GRID, 7),
    "Dilation 3. The same 49 keys,\nthree tokens apart": Neighborhood(_GRID, 7, dilation=3),
    "Stride 5. The queries in the dashed box\nshare the window of the one in its middle": Neighborhood(
        _GRID, 7, stride=5
    ),
    "Causal from top to bottom.\nNo key lies below its query": Neighborhood(_GRID, 7, causal=(True, False)),
}
_SIDES = (14, 28, 40, 56, 80)
_TURNS = 8


@demos.register("13-fna")
def fna(picture: Path) -> Figures:
    """Draw four kinds of neighborhood, and time the plain one against dense attention on growing maps."""
    image = photograph(_GRID[0] * _CELL, _GRID[1] * _CELL)
    figure, axes = plt.subplot_mosaic(
        "ab;cd;tt", figsize=(11.4, 12.2), height_ratios=(1, 1, 0.62), layout="constrained"
    )
    for name, (title, pattern) in zip("abcd", _PANELS.items(), strict=True):
        _draw(axes[name], image, title, pattern)
    times, difference = _measure()
    _draw_times(axes["t"], times)
    figure.suptitle("Neighborhood attention: every query sees the keys nearest to it", fontsize=17, x=0.01, ha="left")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    figures: Figures = {
        "setting": "batch 1, 4 heads of width 32, float32, window 7 x 7",
        "times": f"forward and backward, the fastest of {_TURNS} runs",
    }
    for side, (dense, local) in times.items():
        figures[f"{side} x {side} tokens"] = (
            f"dense {dense * 1e3:.1f} ms, neighborhood {local * 1e3:.1f} ms ({dense / local:.1f} times as fast)"
        )
    return figures | {
        "share of pairs kept at 56 x 56": f"{Neighborhood((56, 56), 7).density(56 * 56):.2%}",
        "largest difference from the dense reference": f"{difference:.1e}",
        "threads": torch.get_num_threads(),
    }


def _draw(ax: Axes, image: np.ndarray, title: str, pattern: Neighborhood) -> None:
    mask = pattern.mask(_GRID[0] * _GRID[1])
    canvas = 0.45 * image.mean(2, keepdims=True).repeat(3, 2) + 0.5  # pale; what a query sees keeps its colours
    for row, column in _QUERIES:
        seen = mask[row * _GRID[1] + column].view(_GRID).numpy()
        lit = np.kron(seen, np.ones((_CELL, _CELL), dtype=bool))
        canvas[lit] = image[lit]
    ax.imshow(canvas, interpolation="bilinear")
    for query, colour in zip(_QUERIES, _COLOURS, strict=True):
        for row, column in mask[query[0] * _GRID[1] + query[1]].view(_GRID).nonzero().tolist():
            ax.add_patch(_box(row, column, edgecolor=colour, facecolor="none", linewidth=0.8, alpha=0.9))
        if pattern.stride != (1, 1):
            corner = [x // s * s for x, s in zip(query, pattern.stride, strict=True)]
            size = [min(s, n - x) for x, s, n in zip(corner, pattern.stride, _GRID, strict=True)]
            ax.add_patch(_box(*corner, *size, edgecolor="white", facecolor="none", linewidth=2, linestyle=(0, (2, 1))))
        ax.add_patch(_box(*query, edgecolor="white", facecolor=colour, linewidth=1.8))
    ax.set_title(title, fontsize=12, loc="left")
    ax.set_axis_off()


def _box(row: int, column: int, rows: int = 1, columns: int = 1, **style: object) -> Rectangle:
    corner = column * _CELL - 0.5, row * _CELL - 0.5
    return Rectangle(corner, columns * _CELL, rows * _CELL, **style)  # type: ignore[arg-type]


def _measure() -> tuple[dict[int, tuple[float, float]], float]:
    """Seconds of (dense, neighborhood) attention by the side of the map, and the distance from the reference at 28."""
    generator = torch.Generator().manual_seed(0)
    times: dict[int, tuple[float, float]] = {}
    difference = 0.0
    for side in _SIDES:
        qkv = tuple(torch.randn(1, 4, side * side, 32, generator=generator).requires_grad_() for _ in range(3))
        pattern = Neighborhood((side, side), 7)
        rivals = (Full(), "sdpa"), (pattern, "tiled")
        # In turns, and the fastest of each, so that other work on the machine favours neither.
        turns = [[_step_seconds(qkv, *rival) for rival in rivals] for _ in range(_TURNS)]
        dense, local = map(min, zip(*turns, strict=True))
        times[side] = dense, local
        if side == 28:
            tiled, reference = (attend(*qkv, pattern=pattern, backend=name) for name in ("tiled", "reference"))
            difference = (tiled - reference).abs().max().item()  # type: ignore[operator]
    return times, difference


def _step_seconds(qkv: tuple[Tensor, ...], pattern: Pattern, backend: str) -> float:
    q, k, v = qkv
    start = time.perf_counter()
    attend(q, k, v, pattern, backend=backend).sum().backward()  # type: ignore[union-attr]
    return time.perf_counter() - start


def _draw_times(ax: Axes, times: dict[int, tuple[float, float]]) -> None:
    tokens = [side * side for side in times]
    for name, colour, column in (("dense attention", "#7F7F7F", 0), ("neighborhood 7 x 7", _COLOURS[1], 1)):
        values = [seconds[column] * 1e3 for seconds in times.values()]
        ax.loglog(tokens, values, "o-", color=colour, linewidth=2.2, markersize=6)
        label = f" {name}\n {values[-1]:.0f} ms"
        ax.annotate(label, (tokens[-1], values[-1]), (6, 0), textcoords="offset points", va="center", color=colour)
    ax.set_title("Time of a training step, forward and backward (milliseconds)", fontsize=12, loc="left")
    ax.set_xticks(tokens, [f"{side} x {side} tokens" for side in times])
    ax.set_xlim(tokens[0] * 0.85, tokens[-1] * 2.1)
    ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(axis="y", color="#E5E5E5")
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
