"""ULSAM on a photograph: a small network learns to read digits pasted somewhere on it, and its maps show where it looks.

Nobody tells the network where a digit is: it learns from the ten labels alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heed.demos.registry import Figures, demos, photograph
from heed.errors import MissingExtra
from heed.layers.ulsam import ULSAM

_SIDE, _DIGIT, _BATCH, _STEPS = 40, 14, 64, 500  # pixels, pixels, images, steps
_DIM, _GROUPS = 32, 4
_SHOWN = 5


class _Reader(nn.Module):
    """Three convolutions, ULSAM, the average over positions, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, _DIM, 3, 2, 1), nn.BatchNorm2d(_DIM), nn.ReLU(),
            nn.Conv2d(_DIM, _DIM, 3, 1, 1), nn.BatchNorm2d(_DIM), nn.ReLU(),
            nn.Conv2d(_DIM, _DIM, 5, 2, 2), nn.BatchNorm2d(_DIM), nn.ReLU(),
        )  # fmt: skip
        self.attention = ULSAM(_DIM, _GROUPS, momentum=0.1)
        self.head = nn.Linear(_DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        # Sums, so that what the attention adds (1 in all, over 100 positions) has weight beside what was there.
        x = self.stem(images)
        return self.head((self.attention(x) - x).sum((2, 3)) + x.mean((2, 3)))


@demos.register("32-ulsam")
def ulsam(picture: Path) -> Figures:
    """Train a reader of digits on cluttered backgrounds; draw its maps and count how much of them lies on the digit."""
    torch.manual_seed(0)
    photo = torch.from_numpy(photograph(120, 180)).mean(-1)
    digits, labels = _digits()
    train, test = torch.randperm(len(labels)).tensor_split([1500])
    model, begin = _Reader(), time.perf_counter()
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 8e-3, _STEPS)
    for _ in range(_STEPS):
        chosen = train[torch.randint(len(train), (_BATCH,))]
        images, _ = _paste(digits[chosen], photo)
        loss = F.cross_entropy(model(images), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    seconds = time.perf_counter() - begin

    model.eval()
    images, inside = _paste(digits[test], photo)
    with torch.no_grad():
        maps = model.attention.attention(model.stem(images))
        correct = model(images).argmax(1) == labels[test]
    covered = F.adaptive_avg_pool2d(inside.float()[:, None], maps.shape[2])
    on_digit = (maps * covered).sum((2, 3)).mean(0)

    figure, axes = plt.subplots(_GROUPS + 1, _SHOWN, figsize=(11, 10.6), layout="constrained")
    rows = np.asarray(axes)
    for i in range(_SHOWN):
        rows[0, i].imshow(images[i, 0], cmap="gray", vmin=0, vmax=1)
        rows[0, i].set_title(f"a {labels[test][i]}, read {'rightly' if correct[i] else 'wrongly'}", fontsize=11)
        for n in range(_GROUPS):
            rows[n + 1, i].imshow(_tinted(images[i, 0], maps[i, n]))
            rows[n + 1, i].contour(inside[i], levels=[0.5], colors="#56B4E9", linewidths=1.6)
    for n in range(_GROUPS):
        rows[n + 1, 0].set_ylabel(f"group {n + 1}\n{on_digit[n]:.0%} on the digit", fontsize=12)
    rows[0, 0].set_ylabel("image", fontsize=12)
    for ax in rows.flat:
        ax.set(xticks=(), yticks=())
        for spine in ax.spines.values():
            spine.set_visible(False)
    figure.suptitle(
        f"ULSAM: each of {_GROUPS} groups of channels has a map of its own\n"
        f"the digit (outlined) covers {covered.mean():.0%} of the image; nobody told the network where it is\n"
        "orange: attention, in each map as a share of its largest value",
        fontsize=15,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)

    return {
        "setting": f"{_SIDE} x {_SIDE} pixels, {_DIM} channels in {_GROUPS} groups on {maps.shape[2]} x {maps.shape[3]}",
        "test accuracy": f"{correct.float().mean():.1%} of {len(test)} digits",
        "attention on the digit, by group": ", ".join(f"{share:.0%}" for share in on_digit),
        "share of the image that the digit covers": f"{covered.mean():.0%}",
        "parameters of ULSAM": sum(p.numel() for p in model.attention.parameters()),
        "training": f"{_STEPS} steps in {seconds:.0f} s",
    }


def _tinted(image: Tensor, attention: Tensor) -> np.ndarray:
    """(S, S, 3): the image in grey, orange where a map attends most."""
    grown = F.interpolate(attention[None, None], size=image.shape, mode="bicubic", align_corners=False)[0, 0]
    weight = 0.9 * (grown / grown.max()).clamp(0, 1)[..., None]
    orange = torch.tensor([1.0, 0.48, 0.0])
    return ((1 - weight) * 0.75 * image[..., None] + weight * orange).clamp(0, 1).numpy()


def _digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's handwritten digits, enlarged: (N, _DIGIT, _DIGIT) in [0, 1], and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "compare") from error
    x, y = cast(tuple[np.ndarray, np.ndarray], load_digits(return_X_y=True))
    images = torch.from_numpy(x).float().view(-1, 1, 8, 8) / 16
    grown = F.interpolate(images, size=(_DIGIT, _DIGIT), mode="bilinear", align_corners=False)
    return grown[:, 0], torch.from_numpy(y)


def _paste(digits: Tensor, photo: Tensor) -> tuple[Tensor, Tensor]:
    """Digits at random places on random crops of the photograph: (B, 1, S, S), and (B, S, S) where they are."""
    count = len(digits)
    height, width = photo.shape
    rows, columns = (torch.randint(side - _SIDE + 1, (count, 1)) + torch.arange(_SIDE) for side in (height, width))
    images = photo[rows[:, :, None], columns[:, None, :]].clone()
    inside = torch.zeros(count, _SIDE, _SIDE, dtype=torch.bool)
    for i, (row, column) in enumerate(torch.randint(_SIDE - _DIGIT + 1, (count, 2)).tolist()):
        window = (i, slice(row, row + _DIGIT), slice(column, column + _DIGIT))
        inside[window] = True
        images[window] += digits[i] * (1 - images[window])  # ink is white
    return images[:, None], inside
