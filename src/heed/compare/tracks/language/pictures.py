"""Pictures for the report of `language`: what a longer context is worth to each method."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np

from heed.compare.results import Results
from heed.compare.tracks.language.settings import POSITIONS
from heed.explain.page import SERIES, SOFT, chart, name_points, svg

_POINTS = 24  # of a line, each the mean over the places since the one before


def context_use(results: Results, folder: Path) -> str | None:
    """Bits per byte against the bytes that came before, a line per method; None where nothing was kept."""
    figure, ax = chart(7.2, 3.0)
    lines = {}
    for index, row in enumerate(results.methods):
        kept = [folder / "trials" / f"{row.method}-{curve.seed}" / POSITIONS for curve in row.curves]
        seen = [json.loads(path.read_text()) for path in kept if path.is_file()]
        if row.status == "ok" and seen:
            places, bits = _smooth(np.array(seen, dtype=float).mean(0))
            colour = SERIES[index % len(SERIES)]
            style = ("-", "--", ":")[index // len(SERIES) % 3]
            ax.plot(places, bits, style, color=colour, linewidth=1.6)
            lines[row.method] = (colour, places[-1], bits[-1])
    if not lines:
        return None
    ax.set_xscale("log", base=2)
    ax.set_xlabel("bytes before", color=SOFT, fontsize=9)
    name_points(ax, [(name, colour, x, y) for name, (colour, x, y) in lines.items()])
    return svg(figure, "positions", "bits per byte of every method against the bytes that came before")


def _smooth(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over stretches that grow with the number of bytes before, from 4 on."""
    edges = np.unique(np.geomspace(4, len(bits), _POINTS).round().astype(int))
    means = [bits[a:b].mean() for a, b in pairwise(edges)]
    return (edges[:-1] + edges[1:]) / 2, np.array(means)
