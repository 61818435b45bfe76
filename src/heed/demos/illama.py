"""iLLaMA on a photograph: four small models learn from which part of it a crop was cut, and one cannot.

With the class token in front, a causal mask leaves it nothing to see but itself; at the end it sees every patch.
"""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from heed.demos.registry import Figures, demos, photograph
from heed.vision.illama import ROADMAP, ILlama, ILlamaConfig, SoftMask
from heed.vision.illama_analysis import map_rank
from heed.vision.illama_training import SoftMaskSchedule, soft_mask_rates

_SIZE, _CROP, _PATCH = (120, 180), 32, 4
_CELLS = (3, 4)  # where a crop may come from: rows, columns
_STEPS, _BATCH, _SOFT = 200, 32, 0.4  # share of the steps in which the mask is soft
_NOISE = 0.15  # the photograph lies in [0, 1]
_SHARED = {"img_size": _CROP, "patch_size": _PATCH, "num_classes": 12, "dim": 48, "depth": 2, "num_heads": 3,
           "hidden_multiple": 16}  # fmt: skip
_FIRST = "class token first, causal"
_SOFTLY = "class token last, soft mask"
# Settings and colour (Okabe and Ito) of every contestant.
_MODELS: dict[str, tuple[dict[str, object], str]] = {
    "a ViT: no mask": (ROADMAP["ViT"], "#7F7F7F"),
    _FIRST: (ROADMAP["causal, class token first"], "#D55E00"),
    "class token last, causal": ({}, "#0072B2"),
    _SOFTLY: ({}, "#009E73"),
}


@demos.register("07-illama")
def illama(picture: Path) -> Figures:
    """Train on noisy crops of the photograph; draw the soft mask, what it leaves, and who learns how fast."""
    photo = torch.from_numpy(photograph(*_SIZE)).permute(2, 0, 1)
    rates = soft_mask_rates(_STEPS, 1, cutoff_epoch=int(_SOFT * _STEPS))
    begin = time.perf_counter()
    curves: dict[str, list[float]] = {}
    models: dict[str, ILlama] = {}
    for name, (settings, _) in _MODELS.items():
        torch.manual_seed(0)
        models[name] = ILlama(ILlamaConfig(**_SHARED | settings))  # type: ignore[arg-type]
        curves[name] = _train(models[name], photo, rates if name == _SOFTLY else None)
    seconds = time.perf_counter() - begin
    trained = models[_SOFTLY].eval()

    figure = plt.figure(figsize=(13.4, 8.8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1))  # type: ignore[misc]
    left, right = top.subfigures(1, 2, width_ratios=(1, 1.5))  # type: ignore[misc]
    _draw_task(left.subplots(), photo)
    axes = right.subplots(1, 3)
    for ax, rate in zip(axes, (1.0, 0.5, 0.0), strict=True):
        _draw_mask(ax, rate)
    right.suptitle("The mask on the way from ViT to LLaMA (rows look at columns)", fontsize=13, x=0.02, ha="left")
    left, right = bottom.subfigures(1, 2, width_ratios=(1, 1.5))  # type: ignore[misc]
    maps = _draw_seen(left.subplots(1, 2), trained, photo)
    _draw_curves(right.subplots(), curves, rates)
    figure.suptitle(
        "iLLaMA: a causal decoder can see pictures, if the class token comes last", fontsize=17, x=0.01, ha="left"
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)

    trained.set_soft_mask(1.0)
    crop = _crops(photo, torch.tensor([[44, 74]]))
    opened = map_rank(trained.attention_maps(crop)).float().mean()
    return {
        "task": f"from which of {_CELLS[0]} x {_CELLS[1]} cells a noisy {_CROP} x {_CROP} crop was cut; chance 8 %",
        **{f"accuracy, {name}": f"{np.mean(curve[-30:]):.0%}" for name, curve in curves.items()},
        "rank of the attention maps": f"{map_rank(maps).float().mean():.1f} causal, {opened:.1f} with the mask opened",
        "training": f"{len(models)} x {_STEPS} steps in {seconds:.0f} s",
    }


def _crops(photo: Tensor, corners: Tensor) -> Tensor:
    """(B, 3, 32, 32) of the photograph, centred on 0."""
    return torch.stack([photo[:, r : r + _CROP, c : c + _CROP] for r, c in corners.tolist()]) - 0.5


def _cell(corners: Tensor) -> Tensor:
    """Which cell a crop's corner lies in."""
    rows, columns = (torch.tensor(_SIZE) - _CROP + 1).tolist()
    return corners[:, 0] * _CELLS[0] // rows * _CELLS[1] + corners[:, 1] * _CELLS[1] // columns


def _train(model: ILlama, photo: Tensor, rates: Tensor | None) -> list[float]:
    """Accuracy of every training batch, which is new to the model."""
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    learning = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    schedule = SoftMaskSchedule(model, rates) if rates is not None else None
    right = []
    for _ in range(_STEPS):
        corners = (torch.rand(_BATCH, 2, generator=generator) * (torch.tensor(_SIZE) - _CROP + 1)).long()
        crops = _crops(photo, corners)
        logits = model(crops + _NOISE * torch.randn(crops.shape, generator=generator))
        loss = F.cross_entropy(logits, _cell(corners))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        learning.step()
        if schedule is not None:
            schedule.step()
        right.append((logits.argmax(1) == _cell(corners)).float().mean().item())
    return right


def _draw_task(ax: Axes, photo: Tensor) -> None:
    ax.imshow(photo.permute(1, 2, 0).numpy())
    rows, columns = (np.linspace(0, side - _CROP, n + 1) + _CROP / 2 for side, n in zip(_SIZE, _CELLS, strict=True))
    ax.hlines(rows, columns[0], columns[-1], color="white", linewidth=0.8)
    ax.vlines(columns, rows[0], rows[-1], color="white", linewidth=0.8)
    ax.add_patch(Rectangle((74, 44), _CROP, _CROP, edgecolor="#F0E442", facecolor="none", linewidth=2.5))
    ax.set_title("In which cell is the middle of the crop?", fontsize=13, loc="left")
    ax.set_axis_off()


def _draw_mask(ax: Axes, rate: float) -> None:
    ax.imshow(SoftMask(rate).weights(17).numpy(), cmap="Greens", vmin=0, vmax=1.25)
    ax.add_patch(Rectangle((-0.5, 15.5), 17, 1, edgecolor="#D55E00", facecolor="none", linewidth=2))
    ax.set_xticks([])
    ax.set_yticks([16], ["class\ntoken"] if rate == 1 else [""], color="#D55E00", fontsize=11)
    ax.tick_params(length=0)
    ax.set_title(f"rate {rate:g}", fontsize=12)


def _draw_seen(axes: np.ndarray, model: ILlama, photo: Tensor) -> Tensor:
    """What the class token takes from each patch, and how much of its attention each patch keeps; returns the maps."""
    crop = _crops(photo, torch.tensor([[44, 74]]))
    maps = model.attention_maps(crop)
    side = _CROP // _PATCH
    taken = maps[1:, 0, :, -1, :-1].mean((0, 1)).view(side, side)
    kept = maps[:, 0, :, :-1].sum(-1).mean((0, 1)).view(side, side)
    image = (crop[0] + 0.5).permute(1, 2, 0).numpy()
    extent = (-0.5, _CROP - 0.5, _CROP - 0.5, -0.5)
    for ax, values, title in (
        (axes[0], taken / taken.max(), "What the class\ntoken looks at"),
        (axes[1], kept, f"What the mask leaves each\npatch: {kept.min():.0%} to {kept.max():.0%}"),
    ):
        ax.imshow(image.mean(2), cmap="gray", extent=extent)
        ax.imshow(values.numpy(), cmap="inferno", vmin=0, vmax=1, extent=extent, alpha=0.6)
        ax.set_title(title, fontsize=13, loc="left")
        ax.set_axis_off()
    return maps


def _draw_curves(ax: Axes, curves: dict[str, list[float]], rates: Tensor) -> None:
    width = 15
    for name, curve in curves.items():
        smooth = np.convolve(curve, np.ones(width) / width, "valid")
        ax.plot(np.arange(len(smooth)) + width / 2, smooth, color=_MODELS[name][1], linewidth=2.2, label=name)
    ax.fill_between(
        range(_STEPS), rates.numpy(), color="#009E73", alpha=0.12, linewidth=0, label="the soft mask's rate"
    )
    ax.axhline(1 / 12, color="black", linewidth=0.8, linestyle=":")
    ax.set(ylim=(0, 1.02), yticks=(0, 0.5, 1), yticklabels=("0", "50%", "100%"))
    ax.set_title(f"Accuracy on new crops over {_STEPS} training steps", fontsize=13, loc="left")
    ax.legend(frameon=False, fontsize=11, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    ax.spines[["top", "right"]].set_visible(False)
