"""The report of a comparison: one self-contained HTML page that needs no network.

Page and charts are made of the parts in `heed.explain.page`. A track's own template adds what only that track has to
show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from heed.compare import table
from heed.compare.results import Cost, Curve, MethodResult, Metric, Results
from heed.compare.track import track
from heed.explain.page import LINE, SERIES, SOFT, chart, name_points, svg, write_page

_MARKERS = "os^Dv"


@dataclass(frozen=True)
class _Mark:
    """How a method looks in every chart and table."""

    colour: str
    marker: str

    @property
    def ink(self) -> str:
        return f"var(--series-{SERIES.index(self.colour)})"


def write_report(results: Results, folder: str | Path) -> Path:
    """Write report.html.

    Args:
        results: of a comparison.
        folder: where it goes; what the run left there lets the report show more (what the models attend to).

    Returns:
        The path of the report.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    folder = Path(folder)
    path = folder / "report.html"
    write_page(path, track(results.track).template, Path(__file__).parent, _content(results, folder))
    return path


def _content(results: Results, folder: Path) -> dict[str, Any]:
    marks = {
        row.method: _Mark(SERIES[index % len(SERIES)], _MARKERS[index // len(SERIES) % len(_MARKERS)])
        for index, row in enumerate(results.methods)
    }
    finished = [row for row in results.methods if row.status == "ok"]
    metric = results.metrics[0]
    return {
        "results": results,
        "settings": results.settings,
        "track": track(results.track),
        "metric": metric,
        "marks": marks,
        "headline": table.headline(results),
        "score": table.score,
        "amount": table.amount,
        "beginning": table.beginning,
        "budget": _budget(results),
        "strips": _strips(finished, metric, marks),
        "curves": {
            what: [
                (row, _curves(row, results, marks, what))
                for row in results.methods
                if any(what in curve.values for curve in row.curves)
            ]
            for what in (metric.name, "loss")
        },
        "better": _better(_charted(results)),
        "tradeoffs": [
            (f"{table.beginning(charted.title)} and {cost.plot}", _tradeoff(finished, charted, cost, marks))
            for cost in results.costs
            for charted in _charted(results)
            if cost.plot and any(row.costs.get(cost.name) for row in finished)
        ],
        "best_path": (folder / results.best.path).as_posix() if results.best else None,
        **track(results.track).pictures(results, folder),
    }


def _charted(results: Results) -> list[Metric]:
    names = track(results.track).charted or (results.metrics[0].name,)
    return [metric for metric in results.metrics if metric.name in names]


def _better(metrics: Sequence[Metric]) -> str:
    """Which way is better in the charts of these."""
    up, down = ([metric.title for metric in metrics if metric.better == way] for way in ("higher", "lower"))
    if up and down:
        return f"Up is better for {table.join(up)}, down for {table.join(down)}"
    return "Up is better" if up else "Down is better"


def _budget(results: Results) -> str:
    settings, steps = results.settings, {row.steps for row in results.methods if row.steps}
    trials = f"{_count(len(results.methods), 'method')}, {_count(settings['seeds'], 'trial')} each"
    if settings.get("minutes"):
        return f"{trials}, {settings['minutes']:g} min of training in all, shared out evenly"
    if len(steps) == 1:
        return f"{trials}, every trial with the same {steps.pop()} training steps"
    return trials


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


# Charts


def _strips(rows: Sequence[MethodResult], metric: Metric, marks: dict[str, _Mark]) -> dict[str, str]:
    """Per method a small chart of its seeds' scores around their mean, all on one scale."""
    every = [value for row in rows for value in row.scores[metric.name].per_seed if value is not None]
    strips = {}
    for row in rows:
        figure = Figure(figsize=(1.7, 0.3))
        ax = figure.add_axes((0.03, 0, 0.94, 1))
        seeds = [value for value in row.scores[metric.name].per_seed if value is not None]
        mark, margin = marks[row.method], 0.08 * max(max(every) - min(every), 1e-3)
        ax.axhline(0, color=LINE, linewidth=1)
        ax.plot(seeds, [0] * len(seeds), "o", color=mark.colour, alpha=0.55, markersize=4.5, markeredgewidth=0)
        ax.plot([np.mean(seeds)] * 2, [-0.8, 0.8], color=mark.colour, linewidth=2.2)
        ax.set(xlim=(min(every) - margin, max(every) + margin), ylim=(-1, 1))
        ax.set_axis_off()
        label = f"{row.method}, every seed: {', '.join(table.score_in_words(metric, value) for value in seeds)}"
        strips[row.method] = svg(figure, f"strip-{row.method}", label)
    return strips


def _curves(row: MethodResult, results: Results, marks: dict[str, _Mark], what: str) -> str:
    """One method's learning curves: every seed thin, their mean thick, the other methods' means pale behind."""
    figure, ax = chart(3.3, 2.2)
    for other in results.methods:
        if other is not row:
            ax.plot(*_mean_curve(other.curves, what), color=SOFT, linewidth=1.2, alpha=0.35)
    colour = marks[row.method].colour
    for curve in row.curves:
        ax.plot(curve.step, curve.values.get(what, ()), color=colour, linewidth=0.8, alpha=0.5)
    ax.plot(*_mean_curve(row.curves, what), color=colour, linewidth=2.2)
    values = [value for other in results.methods for curve in other.curves for value in curve.values.get(what, ())]
    if values:
        margin = 0.04 * max(max(values) - min(values), 1e-3)
        ax.set_ylim(min(values) - margin, max(values) + margin)
    forms = {metric.name: metric.form for metric in results.metrics}
    ax.yaxis.set_major_formatter((lambda y, _: f"{y * 100:.0f} %") if forms.get(what) == "percent" else "{x:g}")
    ax.locator_params(nbins=4)
    ax.set_xlabel("training steps", color=SOFT, fontsize=9)
    return svg(figure, f"{what}-{row.method}", f"{what} of {row.method} over training steps")


def _mean_curve(curves: Sequence[Curve], what: str) -> tuple[list[int], list[float]]:
    """The mean over the seeds that came furthest, at the steps they all report."""
    furthest = max((len(curve.step) for curve in curves), default=0)
    whole = [curve for curve in curves if len(curve.step) == furthest and len(curve.values.get(what, ())) == furthest]
    if not whole:
        return [], []
    return list(whole[0].step), np.mean([curve.values[what] for curve in whole], 0).tolist()


def _tradeoff(rows: Sequence[MethodResult], metric: Metric, cost: Cost, marks: dict[str, _Mark]) -> str:
    """Score against a cost on a logarithmic axis, with the spread as a bar and names in the right margin."""
    figure, ax = chart(4.6, 3.0)
    points = [(row, row.costs.get(cost.name), row.scores[metric.name]) for row in rows]
    points = [(row, x, score.mean, score.spread) for row, x, score in points if x and score.mean is not None]
    for row, x, y, spread in points:
        mark = marks[row.method]
        ax.errorbar(x, y, spread, color=mark.colour, marker=mark.marker, markersize=8, elinewidth=1.2)
    xs = [x for _, x, _, _ in points]
    ax.set_xscale("log")
    room = max(1.25, (max(xs) / min(xs)) ** 0.12)
    ax.set_xlim(min(xs) / room, max(xs) * room)
    ax.minorticks_off()
    ticks = np.unique([float(f"{x:.2g}") for x in np.geomspace(min(xs) / room**0.6, max(xs) * room**0.6, 3)])
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.yaxis.set_major_formatter((lambda y, _: f"{y * 100:.4g} %") if metric.form == "percent" else "{x:g}")
    ax.locator_params(axis="y", nbins=5)
    name_points(ax, [(row.method, marks[row.method].colour, x, y) for row, x, y, _ in points])
    return svg(figure, f"{metric.name}-{cost.name}", f"{metric.title} against {cost.title or cost.short}")
