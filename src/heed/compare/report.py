"""The report of a comparison: one self-contained HTML page that needs no network.

Charts are SVG drawn by matplotlib and put into the page; their inks are the page's CSS variables, so that they follow
it from light to dark. Where the folder holds the trained models, the page also shows what each of them attends to.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import safetensors.torch
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import Tensor

from heed.checkpoint import write_atomically
from heed.compare import table
from heed.compare.results import Curve, MethodResult, Results
from heed.data.images import ImageData
from heed.errors import MissingExtra
from heed.explain.attention import attention_map
from heed.models import from_pretrained
from heed.vision.backbone import Backbone

# Inks as matplotlib writes them, and the CSS variables that stand in for them. The eight series are Okabe and Ito's
# colours, which colour-blind readers can tell apart, with black and yellow exchanged for inks that show on any ground.
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
_INKS = {"#0a0b0c": "var(--ink)", "#8a8b8c": "var(--soft)", "#d8d9da": "var(--line)"}
_INK, _SOFT, _LINE = _INKS
_MARKERS = "os^Dv"
_EXACT = 128  # widest features whose attention is computed along every channel


@dataclass(frozen=True)
class _Mark:
    """How a method looks in every chart and table."""

    colour: str
    marker: str

    @property
    def ink(self) -> str:
        return f"var(--series-{_SERIES.index(self.colour)})"


@dataclass(frozen=True)
class _Seen:
    """What one model makes of one image: two pictures of its attention and its answer."""

    whole: str
    place: str
    answer: str
    right: bool


def write_report(results: Results, folder: str | Path) -> Path:
    """Write report.html.

    Args:
        results: of a comparison.
        folder: where it goes; with samples.safetensors and trials/ in it, the report shows what the models attend to.

    Returns:
        The path of the report.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("jinja2", "compare") from error
    folder = Path(folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": table.percent, "quantity": table.quantity, "accuracy": table.accuracy}
    page = environment.get_template("report.html.j2").render(_content(results, folder))
    path = folder / "report.html"
    write_atomically(path, page)
    return path


def _content(results: Results, folder: Path) -> dict[str, Any]:
    marks = {
        row.method: _Mark(_SERIES[index % len(_SERIES)], _MARKERS[index // len(_SERIES) % len(_MARKERS)])
        for index, row in enumerate(results.methods)
    }
    finished = [row for row in results.methods if row.status == "ok"]
    return {
        "results": results,
        "settings": results.settings,
        "marks": marks,
        "headline": table.headline(results),
        "costs": table.costs,
        "budget": _budget(results),
        "strips": _strips(finished, marks),
        "curves": {
            what: [(row, _curves(row, results.methods, marks, what)) for row in results.methods if row.curves]
            for what in ("accuracy", "loss")
        },
        "tradeoffs": [
            (title, _tradeoff(finished, marks, attribute))
            for title, attribute in (
                ("Accuracy and speed: images per second in training", "train_images_per_second"),
                ("Accuracy and speed: images per second in inference", "infer_images_per_second"),
                ("Accuracy and size: parameters", "parameters"),
            )
            if any(getattr(row, attribute) for row in finished)
        ],
        "attention": _attention(results, folder),
        "best_path": (folder / results.best.path).as_posix() if results.best else None,
        "normalised": _normalisation(folder / "data.safetensors"),
    }


def _budget(results: Results) -> str:
    settings, steps = results.settings, {row.steps for row in results.methods if row.steps}
    trials = f"{_count(len(results.methods), 'method')}, {_count(settings['seeds'], 'trial')} each"
    if settings.get("minutes"):
        return f"{trials}, {settings['minutes']:g} min of training in all, shared out evenly"
    if len(steps) == 1:
        return f"{trials}, every trial with the same {steps.pop()} training steps of {settings['batch_size']} images"
    return trials


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _normalisation(data: Path) -> dict[str, list[float]] | None:
    """Mean and deviation of the training pixels, rounded to be read; None where the images are not kept."""
    if not data.is_file():
        return None
    mean, std = ImageData.load(data).statistics()
    return {name: [round(value, 4) for value in values.tolist()] for name, values in (("mean", mean), ("std", std))}


# Charts


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    ax = figure.add_subplot()
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(_LINE)
    ax.tick_params(colors=_SOFT, length=0, labelsize=9)
    ax.grid(axis="y", color=_LINE, linewidth=0.7)
    ax.set_axisbelow(True)
    return figure, ax


def _svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an inline SVG element: text in the page's font, inks as CSS variables, ids unique by `name`."""
    name = re.sub(r"\W", "-", name)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would style the whole page
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg, count=4)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'\bid="([\w.]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)([\w.]+)', rf"\1{name}-\2", svg)
    for ink, variable in _INKS.items():
        svg = svg.replace(ink, variable)
    for index, colour in enumerate(_SERIES):
        svg = svg.replace(colour, f"var(--series-{index})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def _strips(rows: Sequence[MethodResult], marks: dict[str, _Mark]) -> dict[str, str]:
    """Per method a small chart of its seeds' accuracies around their mean, all on one scale."""
    every = [value for row in rows for value in row.accuracy.per_seed if value is not None]
    strips = {}
    for row in rows:
        figure = Figure(figsize=(1.7, 0.3))
        ax = figure.add_axes((0.03, 0, 0.94, 1))
        seeds = [value for value in row.accuracy.per_seed if value is not None]
        mark, margin = marks[row.method], 0.08 * max(max(every) - min(every), 1e-3)
        ax.axhline(0, color=_LINE, linewidth=1)
        ax.plot(seeds, [0] * len(seeds), "o", color=mark.colour, alpha=0.55, markersize=4.5, markeredgewidth=0)
        ax.plot([np.mean(seeds)] * 2, [-0.8, 0.8], color=mark.colour, linewidth=2.2)
        ax.set(xlim=(min(every) - margin, max(every) + margin), ylim=(-1, 1))
        ax.set_axis_off()
        label = f"accuracies of {row.method}: {', '.join(map(table.percent, seeds))}"
        strips[row.method] = _svg(figure, f"strip-{row.method}", label)
    return strips


def _curves(row: MethodResult, rows: Sequence[MethodResult], marks: dict[str, _Mark], what: str) -> str:
    """One method's learning curves: every seed thin, their mean thick, the other methods' means pale behind."""
    figure, ax = _figure(3.3, 2.2)
    for other in rows:
        if other is not row:
            ax.plot(*_mean_curve(other.curves, what), color=_SOFT, linewidth=1.2, alpha=0.35)
    colour = marks[row.method].colour
    for curve in row.curves:
        ax.plot(curve.step, getattr(curve, what), color=colour, linewidth=0.8, alpha=0.5)
    ax.plot(*_mean_curve(row.curves, what), color=colour, linewidth=2.2)
    values = [value for other in rows for curve in other.curves for value in getattr(curve, what)]
    if values:
        margin = 0.04 * max(max(values) - min(values), 1e-3)
        ax.set_ylim(min(values) - margin, max(values) + margin)
    ax.yaxis.set_major_formatter((lambda y, _: f"{y * 100:.0f} %") if what == "accuracy" else "{x:g}")
    ax.locator_params(nbins=4)
    ax.set_xlabel("training steps", color=_SOFT, fontsize=9)
    return _svg(figure, f"{what}-{row.method}", f"{what} of {row.method} over training steps")


def _mean_curve(curves: Sequence[Curve], what: str) -> tuple[list[int], list[float]]:
    """The mean over the seeds that came furthest, at the steps they all report."""
    furthest = max((len(curve.step) for curve in curves), default=0)
    whole = [curve for curve in curves if len(curve.step) == furthest]
    if not whole:
        return [], []
    return list(whole[0].step), np.mean([getattr(curve, what) for curve in whole], 0).tolist()


def _tradeoff(rows: Sequence[MethodResult], marks: dict[str, _Mark], attribute: str) -> str:
    """Accuracy against a cost on a logarithmic axis, with the spread as a bar and names in the right margin."""
    figure, ax = _figure(4.6, 3.0)
    points = [(row, getattr(row, attribute), row.accuracy.mean) for row in rows]
    points = [(row, x, y) for row, x, y in points if x and y is not None]
    for row, x, y in points:
        mark = marks[row.method]
        ax.errorbar(x, y, row.accuracy.spread, color=mark.colour, marker=mark.marker, markersize=8, elinewidth=1.2)
    xs = [x for _, x, _ in points]
    ax.set_xscale("log")
    room = max(1.25, (max(xs) / min(xs)) ** 0.12)
    ax.set_xlim(min(xs) / room, max(xs) * room)
    ax.minorticks_off()
    ticks = np.unique([float(f"{x:.2g}") for x in np.geomspace(min(xs) / room**0.6, max(xs) * room**0.6, 3)])
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.yaxis.set_major_formatter(lambda y, _: f"{y * 100:.4g} %")
    ax.locator_params(axis="y", nbins=5)
    _name_points(ax, [(row.method, marks[row.method].colour, x, y) for row, x, y in points])
    return _svg(figure, attribute, f"accuracy against {attribute.replace('_', ' ')}")


def _name_points(ax: Axes, points: Sequence[tuple[str, str, float, float]]) -> None:
    """Names in the right margin at the height of their points, pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    gap = max(0.075, 1 / (len(points) + 1)) if len(points) > 12 else 0.075
    height = -1.0
    for name, colour, x, y in sorted(points, key=lambda point: point[3]):
        height = max((y - low) / (high - low), height + gap)
        ax.annotate(
            name,
            (x, y),
            (1.03, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=9.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": _LINE, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5},
        )


# What the models attend to


def _attention(results: Results, folder: Path) -> dict[str, Any] | None:
    """Six test images, and per method and image what its best trial attends to; None without models or images."""
    samples = folder / "samples.safetensors"
    best = {row.method: _best_seed(row) for row in results.methods if row.status == "ok"}
    paths = {method: folder / "trials" / f"{method}-{seed}" / "model" for method, seed in best.items()}
    paths = {method: path for method, path in paths.items() if path.is_dir()}
    if not samples.is_file() or not paths:
        return None
    tensors = safetensors.torch.load_file(samples)
    images, classes = tensors["images"], results.data.classes
    pairs = list(zip(images, tensors["labels"].tolist(), strict=True))
    height, width = images.shape[2:]
    query = height // 2, width // 2
    seen = {}
    for method, path in paths.items():
        model = from_pretrained(path)
        if isinstance(model, Backbone):
            seen[method] = [_see(model, image, label, classes, query) for image, label in pairs]
    return {
        "x": f"{(query[1] + 0.5) / width:.1%}",
        "y": f"{(query[0] + 0.5) / height:.1%}",
        "originals": [(_photo(image), classes[label]) for image, label in pairs],
        "seen": seen,
    }


def _best_seed(row: MethodResult) -> int:
    return int(np.argmax([-1 if value is None else value for value in row.accuracy.per_seed]))


def _see(model: Backbone, image: Tensor, label: int, classes: Sequence[str], query: tuple[int, int]) -> _Seen:
    with torch.no_grad():
        answer = int(model(image[None]).argmax())
    options: dict[str, Any] = {}
    if model.num_features > _EXACT:
        options = {"directions": _EXACT // 2, "generator": torch.Generator().manual_seed(0)}
    whole, place = (_heat(attention_map(model, image, where, **options)) for where in (None, query))
    return _Seen(whole, place, classes[answer], answer == label)


def _heat(attention: Tensor) -> str:
    """A map as a picture; the square root lets small shares be seen."""
    shade = (attention / attention.max().clamp_min(1e-12)).sqrt().numpy()
    return _png((mpl.colormaps["cividis"](shade)[..., :3] * 255).astype(np.uint8))


def _photo(image: Tensor) -> str:
    """A normalised image (C, H, W) as a picture, from its darkest to its brightest value."""
    low, high = image.min(), image.max()
    levels = ((image - low) / (high - low).clamp_min(1e-6) * 255).byte().permute(1, 2, 0).numpy()
    return _png(levels if levels.shape[2] == 3 else levels[..., :1].repeat(3, 2))


def _png(pixels: np.ndarray) -> str:
    """(H, W, 3) bytes as a data URI; the page scales it up without blurring."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
