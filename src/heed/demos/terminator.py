"""Terminator on a photograph: its generated kernels before and after training, and what they do to the picture.

The network learns to say from which of six parts of the photograph a crop was taken.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

import heed
from heed.demos.registry import Figures, demos, photograph
from heed.layers.hyperzzw import hyperzzw_global
from heed.vision.terminator import SFNEBlock, Terminator
from heed.vision.terminator_training import Kar3, terminator_loss, warmup_cosine

_SIZE, _CELL = (96, 144), 48  # 2 x 3 parts
_CROP = 26
_STEPS, _BATCH = 90, 16
_CORNER = (16, 38)  # of the crop in the picture
_ASKS = (9, 17)  # row and column of the output pixel whose view is drawn


@demos.register("36-hyperzzw")
def hyperzzw(picture: Path) -> Figures:
    """Train a small Terminator with Kar3; draw its kernels, the two factors of the operator, and what a pixel sees."""
    torch.manual_seed(0)
    photo = torch.from_numpy(photograph(*_SIZE)).permute(2, 0, 1)
    normalised = (photo - photo.mean((1, 2), keepdim=True)) / photo.std()
    model = cast(
        Terminator,
        heed.create_model(
            "terminator_micro",
            img_size=_CROP,
            in_chans=3,
            num_classes=_SIZE[0] * _SIZE[1] // _CELL**2,
            dims=(12, 12, 24),
            previous=(0, 0, 1),
            local_sizes=(3, 9, 5, 7),
            global_layers=(3, 2, 2),
            dropout=(0.0,) * 3,
            omega=1.0,
        ),
    )
    first = next(model.sfne_blocks())
    with torch.no_grad():
        before = first.operator.slow()[0]
    begin = time.perf_counter()
    losses, accuracy = _train(model, normalised)
    seconds = time.perf_counter() - begin
    row, column = _CORNER
    shown = photo[:, row : row + _CROP, column : column + _CROP]
    crop = normalised[None, :, row : row + _CROP, column : column + _CROP]
    with torch.no_grad():
        parts = first.operator.parts(crop)
        out = hyperzzw_global(parts.context, parts.fast)
    seen = _seen(first, crop)

    figure = plt.figure(figsize=(14, 8.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    axes = figure.subplot_mosaic([["crop", "before", "after", "seen"], ["context", "fast", "out", "loss"]])
    _show(axes["crop"], shown, "x: a crop of the photograph,\nand a pixel that is asked about")
    _mark(axes["crop"])
    _show(axes["before"], _colours(before), "W: the generated kernels of red, green\nand blue, before training")
    _show(axes["after"], _colours(parts.kernel[0]), "W: the same after training")
    axes["seen"].imshow(seen.log10(), cmap="magma", vmin=seen.median().log10().item() - 0.7)
    _finish(axes["seen"], "What the pixel sees of the crop:\nits row, its column, faintly all else")
    _mark(axes["seen"])
    _show(axes["context"], _colours(parts.context[0]), "Z.W = x * W: kernels that\nknow the picture")
    _show(axes["fast"], _colours(parts.fast[0]), "Z: what the fast net\nmakes of x and Z.W")
    _show(axes["out"], _colours(out[0]), "(Z.W) @ Z: a pixel is a row of the one\ntimes a column of the other")
    _draw_losses(axes["loss"], losses)
    figure.suptitle(
        "HyperZ.Z.W: a small network of coordinates generates kernels as large as the picture", fontsize=17,
        x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(picture, dpi=100)
    plt.close(figure)
    split = model.parameter_split()
    cross = torch.zeros(_CROP, _CROP, dtype=torch.bool)
    cross[_ASKS[0]] = cross[:, _ASKS[1]] = True
    return {
        "setting": f"crops of {_CROP} x {_CROP} pixels, {len(model.blocks)} blocks, no residual connections",
        "parameters": f"{split['slow']:,} in slow nets, {split['fast']:,} in fast nets",
        "accuracy at telling six parts of the photograph apart": f"{accuracy:.0%}",
        "largest mean of a block's standardised features": f"{max(map(abs, model.feature_means(crop))):.0e}",
        "input pixels that the output pixel sees": f"{int((seen > 0).sum())} of {seen.numel()}",
        "its row and column see, over the rest": f"{seen[cross].mean() / seen[~cross].mean():.1f} times as much",
        "training": f"{_STEPS} steps of Kar3 in {seconds:.0f} s",
    }


def _crops(photo: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Crops (count, 3, s, s) anywhere in the photograph, and the part that holds the middle of each."""
    corners = torch.stack([torch.randint(side - _CROP + 1, (count,)) for side in _SIZE], 1)
    crops = torch.stack([photo[:, r : r + _CROP, c : c + _CROP] for r, c in corners.tolist()])
    cells = (corners + _CROP // 2) // _CELL
    return crops, cells[:, 0] * (_SIZE[1] // _CELL) + cells[:, 1]


def _train(model: Terminator, photo: Tensor) -> tuple[list[float], float]:
    """Train; the cross-entropy of every step, and the accuracy on new crops."""
    optimiser = Kar3(model.parameters(), 2e-3)
    schedule = warmup_cosine(optimiser, _STEPS, _STEPS // 12)
    losses = []
    for _ in range(_STEPS):
        loss, _ = terminator_loss(model, *_crops(photo, _BATCH))
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.cross_entropy.item())
    model.eval()
    with torch.no_grad():
        batches = [_crops(photo, 20) for _ in range(8)]
        right = torch.cat([model(crops).argmax(1) == parts for crops, parts in batches])
    return losses, right.float().mean().item()


def _seen(block: SFNEBlock, crop: Tensor) -> Tensor:
    """(S, S) how much the operator's output at one pixel depends on each pixel of the crop, over all channels."""
    x = crop.clone().requires_grad_()
    out = block.operator(x)[0, :, _ASKS[0], _ASKS[1]]
    return sum((torch.autograd.grad(y, x, retain_graph=True)[0][0].abs().sum(0) for y in out), torch.zeros(()))


def _colours(maps: Tensor) -> Tensor:
    """Three maps (3, S, S) as red, green and blue, each stretched to [0, 1]."""
    low, high = maps.flatten(1).quantile(torch.tensor([0.02, 0.98]), 1)[..., None, None]
    return ((maps - low) / (high - low)).clamp(0, 1)


def _draw_losses(ax: Axes, losses: list[float]) -> None:
    smooth = np.convolve(np.pad(losses, 4, "edge"), np.ones(9) / 9, "valid")
    ax.plot(losses, color="silver", linewidth=1)
    ax.plot(smooth, color="#0072B2", linewidth=2.4)
    ax.set(xlabel="training step", ylim=(0, None))
    ax.set_box_aspect(0.9)
    _title(ax, "Cross-entropy in training with Kar3:\nwhere in the photograph is the crop?")
    ax.spines[["top", "right"]].set_visible(False)


def _mark(ax: Axes) -> None:
    row, column = _ASKS
    ax.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#56B4E9", linewidth=2.5))


def _show(ax: Axes, image: Tensor, title: str) -> None:
    ax.imshow(image.permute(1, 2, 0))
    _finish(ax, title)


def _finish(ax: Axes, title: str) -> None:
    _title(ax, title)
    ax.set_axis_off()


def _title(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=12, loc="left")
