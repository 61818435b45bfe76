"""One question about one picture, answered by a model as it is and as a method steers it, and drawings of where it looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from heed.errors import MissingExtra
from heed.methods import Method, apply
from heed.multimodal.answering import answer, image_grid, load_model, prepare
from heed.multimodal.registry import PLAIN, steering
from heed.multimodal.sinks import SinkRule
from heed.multimodal.watch import WatchAttention, WatchRule, middle_layers

# The corners of a square within a cell.
_ACROSS, _DOWN = np.array([0.08, 0.92, 0.92, 0.08, 0.08]), np.array([0.08, 0.08, 0.92, 0.92, 0.08])


@dataclass(frozen=True, eq=False)
class Look:
    """How a model answered, and where it looked.

    Args:
        text: the answer.
        attention: (rows, columns) the mean attention to each place of the image, over the answer's tokens; None for
            models whose image tokens have no places.
        sinks: (rows, columns) True where a method saw a sink in one of the layers looked at; None where none looked.
        layers: decoder layers the attention is the mean of.
    """

    text: str
    attention: np.ndarray | None
    sinks: np.ndarray | None
    layers: tuple[int, ...]


def open_image(path: str | Path) -> Any:
    """A picture as a PIL image in RGB.

    Raises:
        ValueError: there is no such file, or it is no picture.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtra("pillow", "multimodal") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"image={str(path)!r}: there is no such file") from error
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image={str(path)!r} cannot be read as a picture") from error


def look(
    model: nn.Module,
    processor: Any,
    image: Any,
    text: str,
    *,
    method: Method | None = None,
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 128,
) -> Look:
    """Answer a question, steered by a method or not, and see where the model looks.

    Args:
        model, processor: as `load_model` gives them.
        image: a PIL image.
        text: the question.
        method: applied while it answers; None for the model as it is.
        layers: decoder layers to look at; None for three at a third of the depth.
        max_new_tokens: of the answer.

    Raises:
        ValueError: the method does not fit the model.
    """
    inputs = prepare(model, processor, [image], [text])
    handles = [] if method is None else [apply(model, method)]
    try:
        handles.append(apply(model, WatchAttention()))
        written = answer(model, processor, inputs, max_new_tokens=max_new_tokens)[0]
        seen: WatchRule = handles[-1].state
        chosen = tuple(middle_layers(len(seen.host.layers)) if layers is None else layers)
        attention = seen.on_image(chosen).mean(0).numpy()
        rule = handles[0].state
        sinks = None
        if isinstance(rule, SinkRule):
            places = rule.prompt.image[0].cpu()
            found = [rule.sinks[n][0].cpu() for n in chosen if n in rule.sinks]
            sinks = torch.stack(found).any(0)[places].numpy() if found else np.zeros(int(places.sum()), bool)
    finally:
        for handle in reversed(handles):
            handle.remove()
    grid = image_grid(model, inputs, len(attention))
    if grid is None:
        return Look(written, None, None, chosen)
    cells = grid[0] * grid[1]
    return Look(
        written, attention[:cells].reshape(grid), None if sinks is None else sinks[:cells].reshape(grid), chosen
    )


def ask(
    image: str | Path,
    text: str,
    *,
    model: str | Path,
    method: str = "var",
    out: str | Path = "ask",
    device: str = "auto",
    dtype: str = "auto",
    max_new_tokens: int = 128,
) -> tuple[dict[str, Look], Path | None]:
    """Ask a model about a picture, plain and steered, and draw where it looked.

    Args:
        image: the picture's file.
        text: the question.
        model: a folder written by `save_pretrained` (model and processor), or an id on the Hub.
        method: name of a steering method.
        out: folder for the drawing.
        device, dtype: as in `load_model`.
        max_new_tokens: of an answer.

    Returns:
        What was answered, by "plain" and the method's name, and the PNG; None where image tokens have no places.

    Raises:
        ValueError: a picture, model or method that cannot be used.
    """
    steering.get(method)
    picture = open_image(image)
    host, processor = load_model(model, device=device, dtype=dtype)
    prompt = prepare(host, processor, [picture], [text])
    made = {name: steering.get(name)(host, [prompt]) for name in (PLAIN, method)}
    looks = {
        name: look(host, processor, picture, text, method=steered, max_new_tokens=max_new_tokens)
        for name, steered in made.items()
    }
    if any(seen.attention is None for seen in looks.values()):
        return looks, None
    path = Path(out) / f"{Path(image).stem}-{method}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_looks(picture, text, looks, path)
    return looks, path


def draw_looks(picture: Any, text: str, looks: dict[str, Look], path: Path) -> None:
    """Draw the picture, where each look went, and what the last gained over the first, as a PNG."""
    import matplotlib.pyplot as plt

    pixels = np.asarray(picture)
    first, last = next(iter(looks.values())), list(looks.values())[-1]
    count = len(looks) + 1 + (len(looks) > 1)
    figure, axes = plt.subplots(1, count, figsize=(3.7 * count, 4.6), layout="constrained")
    axes[0].imshow(pixels)
    axes[0].set_title("the picture", fontsize=11)
    top = max(float(_shown(seen).max()) for seen in looks.values())
    for ax, (name, seen) in zip(axes[1:], looks.items(), strict=False):
        draw_overlay(ax, pixels, _shown(seen), "inferno", 0, top)
        draw_sinks(ax, pixels, seen.sinks)
        ax.set_title(f"{name}\n{_short(seen.text)}", fontsize=11)
    if len(looks) > 1:
        change = _shown(last) - _shown(first)
        reach = float(np.abs(change).max()) or 1.0
        draw_overlay(axes[-1], pixels, change, "RdBu_r", -reach, reach)
        draw_sinks(axes[-1], pixels, last.sinks)
        axes[-1].set_title("what changed\nred: more attention, blue: less", fontsize=11)
    for ax in axes:
        ax.set_axis_off()
    squares = ""
    if last.sinks is not None:
        squares = "; squares are sinks" if last.sinks.any() else "; no image token is a sink there"
    figure.suptitle(text, fontsize=14, x=0.01, ha="left")
    figure.supxlabel(
        f"attention of the answer to the image, layers {first.layers[0]} to {first.layers[-1]}{squares}", fontsize=9
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _shown(seen: Look) -> np.ndarray:
    return np.zeros((1, 1)) if seen.attention is None else np.asarray(seen.attention)


def draw_overlay(ax: Any, pixels: np.ndarray, values: np.ndarray, colours: str, low: float, high: float) -> None:
    """The picture in grey under values laid over it."""
    height, width = pixels.shape[:2]
    ax.imshow(pixels.mean(2), cmap="gray", vmin=-120, vmax=300, extent=(0, width, height, 0))
    ax.imshow(values, cmap=colours, vmin=low, vmax=high, alpha=0.72, extent=(0, width, height, 0))


def draw_sinks(ax: Any, pixels: np.ndarray, sinks: np.ndarray | None) -> None:
    """Squares around the cells that are sinks."""
    if sinks is None:
        return
    height, width = pixels.shape[0] / sinks.shape[0], pixels.shape[1] / sinks.shape[1]
    for row, column in zip(*np.nonzero(sinks), strict=True):
        x, y = (_ACROSS + column) * width, (_DOWN + row) * height
        ax.plot(x, y, color="#35d0ff", linewidth=1.6)


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
