"""VAR on a vision-language model that is trained on the spot: where it looks on a photograph, and what VAR changes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Circle

from heed.demos.registry import Figures, demos, photograph
from heed.methods import apply
from heed.multimodal.answering import answer, prepare
from heed.multimodal.ask import draw_overlay, draw_sinks, look
from heed.multimodal.scenes import SIDE, Ground, Scene, draw_scene, where
from heed.multimodal.sinks import find_sink_dimensions
from heed.multimodal.tiny import tiny_model, tiny_processor, train_tiny
from heed.multimodal.var import VAR
from heed.multimodal.watch import sink_statistics

_STEPS, _TESTED, _SHOWN = 450, 150, 3


@demos.register("12-var")
def var(picture: Path) -> Figures:
    """Train a tiny LLaVA on shapes before a photograph, ask it where they are, and steer how it looks."""
    ground, begin = _crops(), time.perf_counter()
    model, processor = tiny_model(1), tiny_processor()
    train_tiny(model, processor, steps=_STEPS, seed=1, ground=ground)
    seconds = time.perf_counter() - begin
    random = np.random.default_rng(5)
    scenes = [draw_scene(random, ground) for _ in range(_TESTED)]
    asked = [scene.names[int(random.integers(len(scene.names)))] for scene in scenes]
    inputs = prepare(model, processor, [scene.image for scene in scenes], [where(name) for name in asked])
    found = find_sink_dimensions(model, [inputs])
    steered = VAR(sink_dimensions=found.dimensions, tau=found.tau)
    truth = [scene.place(name) for scene, name in zip(scenes, asked, strict=True)]

    def right() -> float:
        return float(np.mean([a == b for a, b in zip(answer(model, processor, inputs), truth, strict=True)]))

    plain_right = right()
    with apply(model, steered) as handle:
        steered_right = right()
        rows = [float(chosen.float().mean()) for chosen in handle.state.selected.values()]
    layers = sink_statistics(model, inputs, found.dimensions, tau=found.tau)
    _draw(picture, model, processor, scenes, asked, steered)
    last = max(layers, key=lambda entry: entry.visual)
    return {
        "model": f"LLaVA of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights, trained for {seconds:.0f} s",
        "sink dimensions": f"{', '.join(map(str, found.dimensions))} of {model.config.text_config.hidden_size}",
        "visual sinks": f"{last.visual:.1f} of 16 image tokens in layer {last.layer}",
        "attention of the text there": f"{last.on_visual:.1%} on visual sinks, {last.on_others:.1%} on other image tokens",
        "heads that VAR changed": f"{np.mean(rows):.0%} at the last token" if rows else "none",
        "where is it: right": f"{plain_right:.1%} plain, {steered_right:.1%} with VAR, of {_TESTED}",
    }


def _crops() -> Ground:
    """Pieces of a photograph, paled so that the shapes stand out."""
    photo = photograph(160, 240)

    def crop(random: np.random.Generator) -> np.ndarray:
        row, column = (int(random.integers(size - SIDE)) for size in photo.shape[:2])
        return 255 * (0.55 + 0.42 * photo[row : row + SIDE, column : column + SIDE])

    return crop


def _draw(path: Path, model: Any, processor: Any, scenes: list[Scene], asked: list[str], steered: VAR) -> None:
    figure, axes = plt.subplots(_SHOWN, 4, figsize=(13, 3.35 * _SHOWN + 0.8), layout="constrained")
    for row, scene, name in zip(axes, scenes, asked, strict=False):
        pixels = np.asarray(scene.image)
        looks = [look(model, processor, scene.image, where(name), method=method) for method in (None, steered)]
        maps = [np.zeros((1, 1)) if seen.attention is None else seen.attention for seen in looks]
        top = max(float(values.max()) for values in maps)
        shape = next(shape for shape in scene.shapes if shape.name == name)
        row[0].imshow(pixels)
        row[0].add_patch(Circle(shape.centre, shape.radius * 1.25, fill=False, color="white", linewidth=2.4))
        row[0].set_title(where(name).replace(" in the image", ""), fontsize=12)
        for ax, title, seen, values in zip(row[1:3], ("plain", "with VAR"), looks, maps, strict=True):
            draw_overlay(ax, pixels, values, "inferno", 0, top)
            draw_sinks(ax, pixels, looks[1].sinks)
            ax.set_title(f"{title}: {seen.text}, {values.sum():.0%} on the image", fontsize=12)
        change = maps[1] - maps[0]
        reach = float(np.abs(change).max()) or 1.0
        draw_overlay(row[3], pixels, change, "RdBu_r", -reach, reach)
        draw_sinks(row[3], pixels, looks[1].sinks)
        row[3].set_title(f"what VAR moved: {np.abs(change).sum() / 2:.1%}", fontsize=12)
    for ax in axes.flat:
        ax.set_axis_off()
    figure.suptitle(
        "VAR: attention leaves the sinks (blue squares) for the rest of the image", fontsize=17, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)
