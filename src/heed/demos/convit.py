"""ConViT on a photograph: its heads start as the taps of a convolution, and training lets them leave their places.

The network learns to say from which of 24 parts of the photograph a crop was taken.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import SubFigure
from torch import Tensor

import heed
from heed.demos.registry import Figures, demos, photograph
from heed.vision.convit import ConViT, LocalityLog

_SIZE, _CELL = (192, 288), 48  # 4 x 6 parts
_CROP, _PATCH = 72, 8  # 9 x 9 tokens
_HEADS, _DEPTH = 9, 6  # 3 x 3 taps; five GPSA blocks and one with the class token
_STEPS, _BATCH, _EVERY = 300, 16, 20
_CORNER = (44, 64)  # of the crop in the picture
_QUERY = (4, 4)  # row and column of a patch in it


@demos.register("16-convit")
def convit(picture: Path) -> Figures:
    """Train a small ConViT and draw where its heads look at first, where at the end, and how their gates move."""
    torch.manual_seed(0)
    photo = torch.from_numpy(photograph(*_SIZE)).permute(2, 0, 1)
    model = cast(
        ConViT,
        heed.create_model(
            "convit_micro",
            img_size=_CROP,
            patch_size=_PATCH,
            in_chans=3,
            num_classes=_SIZE[0] * _SIZE[1] // _CELL**2,
            dim=8 * _HEADS,
            num_heads=_HEADS,
            depth=_DEPTH,
        ),
    )
    row, column = _CORNER
    shown = photo[:, row : row + _CROP, column : column + _CROP]
    normalised = photo - photo.mean((1, 2), keepdim=True)
    crop = normalised[:, row : row + _CROP, column : column + _CROP]
    before = model.eval().attention_maps(crop[None])
    log = LocalityLog(model, _crops(normalised, 16)[0])
    begin = time.perf_counter()
    accuracy = _train(model, normalised, log)
    seconds = time.perf_counter() - begin
    after = model.eval().attention_maps(crop[None])

    figure = plt.figure(figsize=(14, 9), layout="constrained")
    top, bottom = cast(np.ndarray, figure.subfigures(2, 1, height_ratios=(1.25, 1)))
    panels = cast(np.ndarray, top.subfigures(1, 4))
    _draw_crop(panels[0], shown)
    last = _DEPTH - 2
    _draw_heads(panels[1], shown, before[0], "At first: nine heads, nine taps of 3 x 3")
    _draw_heads(panels[2], shown, after[0], "After training, block 1")
    _draw_heads(panels[3], shown, after[last], f"After training, block {last + 1}")
    axes = cast(np.ndarray, bottom.subplots(1, 2))
    steps = cast(list[int], log.steps)
    gates, reach = torch.stack(log.gates).mean(2), torch.stack(log.nonlocality).mean(2)
    _draw_curves(axes[0], steps, gates, "Gate: the share of position in the attention, mean over heads")
    _draw_curves(axes[1], steps, reach[:, : last + 1], "Non-locality: how far heads look, in patches")
    figure.suptitle(
        "Gated positional self-attention starts as a convolution and is free to stop being one",
        fontsize=17,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=100)
    plt.close(figure)
    figures: Figures = {
        "setting": f"{_CROP // _PATCH} x {_CROP // _PATCH} patches, {_HEADS} heads, {_DEPTH - 1} GPSA blocks and one MHSA",
        "accuracy at telling 24 parts of the photograph apart": f"{accuracy:.0%}",
    }
    for i in range(last + 1):
        figures[f"block {i + 1}"] = (
            f"gate {gates[0, i]:.2f} -> {gates[-1, i]:.2f}, non-locality {reach[0, i]:.2f} -> {reach[-1, i]:.2f} patches"
        )
    return figures | {"training": f"{_STEPS} steps in {seconds:.0f} s"}


def _crops(photo: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Crops (count, 3, s, s) anywhere in the photograph, and the part that holds the middle of each."""
    corners = torch.stack([torch.randint(side - _CROP + 1, (count,)) for side in _SIZE], 1)
    crops = torch.stack([photo[:, r : r + _CROP, c : c + _CROP] for r, c in corners.tolist()])
    cells = (corners + _CROP // 2) // _CELL
    return crops + 0.02 * torch.randn_like(crops), cells[:, 0] * (_SIZE[1] // _CELL) + cells[:, 1]


def _train(model: ConViT, photo: Tensor, log: LocalityLog) -> float:
    """Train, record, and return the accuracy on new crops."""
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, _STEPS)
    model.train()
    for step in range(_STEPS):
        if step % _EVERY == 0:
            log(step)
        crops, parts = _crops(photo, _BATCH)
        optimiser.zero_grad()
        F.cross_entropy(model(crops), parts).backward()
        optimiser.step()
        schedule.step()
    log(_STEPS)
    crops, parts = _crops(photo, 200)
    with torch.no_grad():
        return (model.eval()(crops).argmax(1) == parts).float().mean().item()


def _draw_crop(panel: SubFigure, image: Tensor) -> None:
    ax = panel.subplots()
    ax.imshow(image.permute(1, 2, 0), extent=(0, _CROP, _CROP, 0))
    _mark_query(ax, 2.5)
    ax.set_axis_off()
    ax.set_title("A crop, and the patch that asks", fontsize=12)


def _draw_heads(panel: SubFigure, image: Tensor, attention: Tensor, title: str) -> None:
    """The weights of the query's heads as light on the crop, laid out as the taps are."""
    side = _CROP // _PATCH
    query = _QUERY[0] * side + _QUERY[1]
    for i, ax in enumerate(cast(np.ndarray, panel.subplots(3, 3)).flat):
        head = i // 3 + 3 * (i % 3)  # the authors number taps column by column
        weights = attention[0, head, query].view(side, side)
        light = weights / weights.max()
        ax.imshow(image.mean(0), cmap="gray", extent=(0, _CROP, _CROP, 0))
        ax.imshow(np.zeros((side, side)), cmap="gray", extent=(0, _CROP, _CROP, 0), alpha=0.6)
        ax.imshow(light, cmap="inferno", norm=Normalize(0, 1), alpha=light.sqrt().numpy(), extent=(0, _CROP, _CROP, 0))
        _mark_query(ax, 1.2)
        ax.set_axis_off()
    panel.suptitle(title, fontsize=12)


def _mark_query(ax: Axes, width: float) -> None:
    row, column = (_PATCH * x for x in _QUERY)
    ax.add_patch(plt.Rectangle((column, row), _PATCH, _PATCH, fill=False, edgecolor="#56B4E9", linewidth=width))


def _draw_curves(ax: Axes, steps: list[int], values: Tensor, title: str) -> None:
    """One line per block, dark for early ones."""
    count = values.shape[1]
    for i in range(count):
        colour = plt.get_cmap("viridis")(0.9 * i / max(1, count - 1))
        ax.plot(steps, values[:, i], color=colour, linewidth=2.2, label=f"block {i + 1}")
    ax.legend(frameon=False, fontsize=10, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xlabel="training step")
    ax.set_title(title, fontsize=12, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
