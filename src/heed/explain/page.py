"""Parts of heed's reports: self-contained HTML pages that need no network and follow the reader from light to dark.

Charts are SVG drawn by matplotlib and put into the page. They are drawn with a few fixed inks, for which the page's CSS
variables are put in, so that one chart suits either ground. Maps and photographs are PNG inside the page.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from heed.checkpoint import write_atomically
from heed.errors import MissingExtra

# Inks as matplotlib writes them, and the CSS variables that stand in for them. The eight series are Okabe and Ito's
# colours, which colour-blind readers can tell apart, with black and yellow exchanged for inks that show on any ground.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
_INKS = {"#0a0b0c": "var(--ink)", "#8a8b8c": "var(--soft)", "#d8d9da": "var(--line)"}
INK, SOFT, LINE = _INKS


def write_page(path: Path, template: str, folder: Path, content: dict[str, Any]) -> None:
    """Fill a template and write the page, atomically.

    Args:
        path: the page to write.
        template: name of a jinja2 template, which extends "page.html.j2".
        folder: where the template lies.
        content: what the template shows.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("jinja2", "compare") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    write_atomically(path, environment.get_template(template).render(content))


def chart(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure (inches) with one plain set of axes in the inks of the page."""
    figure = Figure(figsize=(width, height), layout="constrained")
    ax = figure.add_subplot()
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(LINE)
    ax.tick_params(colors=SOFT, length=0, labelsize=9)
    ax.grid(axis="y", color=LINE, linewidth=0.7)
    ax.set_axisbelow(True)
    return figure, ax


def name_points(ax: Axes, points: Sequence[tuple[str, str, float, float]]) -> None:
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
            arrowprops={"arrowstyle": "-", "color": LINE, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5},
        )


def svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an inline SVG element: text in the page's font, inks as CSS variables, ids unique by `name`."""
    name = re.sub(r"\W", "-", name)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)  # it would style the whole page
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", text, count=4)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r'\bid="([\w.]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)([\w.]+)', rf"\1{name}-\2", text)
    for ink, variable in _INKS.items():
        text = text.replace(ink, variable)
    for index, colour in enumerate(SERIES):
        text = text.replace(colour, f"var(--series-{index})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def heat(attention: Float[Tensor, "H W"]) -> str:
    """A map >= 0 as a picture; the square root lets small shares be seen."""
    shade = (attention / attention.max().clamp_min(1e-12)).sqrt().numpy()
    return png((mpl.colormaps["cividis"](shade)[..., :3] * 255).astype(np.uint8))


def photo(image: Float[Tensor, "C H W"]) -> str:
    """A normalised image of one or three channels as a picture, from its darkest to its brightest value."""
    low, high = image.min(), image.max()
    levels = ((image - low) / (high - low).clamp_min(1e-6) * 255).byte().permute(1, 2, 0).numpy()
    return png(levels if levels.shape[2] == 3 else levels[..., :1].repeat(3, 2))


def png(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    """Pixels as a data URI; the page scales the picture up without blurring."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
