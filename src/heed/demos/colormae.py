"""ColorMAE: noise of five colours, what a mask cut from each leaves visible of a photograph, and how it trains.

One small masked autoencoder per colour learns to draw handwritten digits (scikit-learn's, a pixel per patch), all from
the same start and for as long; the pictures are of digits it was not trained on.
"""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from heed.data.images import load_images
from heed.demos.registry import Figures, demos, photograph
from heed.pretrain.color import ColorMask
from heed.pretrain.mae import MaskedAutoencoder, MaskedViTConfig, masked_vit
from heed.pretrain.masks import piece_size
from heed.pretrain.noise import NoiseBank, periodogram
from heed.pretrain.patches import patchify, show_masked, unpatchify

_SIDE, _PATCH = 168, 12  # of the photograph's part that is shown: 14 x 14 patches
_GRID = (_SIDE // _PATCH, _SIDE // _PATCH)
_STEPS, _BATCH, _TESTED, _SHOWN = 600, 24, 200, 4
_VIT = MaskedViTConfig(
    8, 1, 1, dim=48, depth=1, num_heads=4, decoder_dim=32, decoder_depth=1, decoder_heads=4, norm_pix=False
)
_COLORS = {  # ink, and what the filter does
    "red": ("#B5483A", "low frequencies"),
    "green": ("#1B8A5A", "a middle band"),
    "white": ("#55585C", "all: random masks"),
    "purple": ("#7D4FA8", "all but the middle band"),
    "blue": ("#2468B2", "high frequencies"),
}


@demos.register("06-colormae")
def colormae(picture: Path) -> Figures:
    """Draw noise, spectrum, visible patches and reconstruction for every colour."""
    photo = torch.from_numpy(photograph(_SIDE, 252)).permute(2, 0, 1)[:, :, 30 : 30 + _SIDE]
    digits = _digits()
    figure, axes = plt.subplots(
        4, len(_COLORS), figsize=(13.4, 11.2), height_ratios=(1, 1.08, 1, 0.78), layout="constrained"
    )
    figures: Figures = {
        "setting": f"{_GRID[0]} x {_GRID[1]} patches of the photograph and 8 x 8 of a digit, a quarter of them visible"
    }
    begin = time.perf_counter()
    for (color, (ink, band)), column in zip(_COLORS.items(), axes.T, strict=True):
        bank = NoiseBank.make(color, patterns=512, size=64)
        mask = ColorMask(bank)
        hidden = mask(256, _GRID, generator=_rng())
        pieces = piece_size(hidden, _GRID)
        model, error = _train(mask, digits)
        noise, spectrum, visible, drawn = column
        noise.imshow(bank.patterns[0, :40, :40], cmap="gray")
        noise.set_title(f"{color}\n{band}", color=ink, fontsize=13, fontweight="bold")
        spectrum.imshow(periodogram(bank.patterns).mean(0), cmap="magma", extent=(-0.5, 0.5, -0.5, 0.5))
        spectrum.set(xticks=(-0.5, 0, 0.5), yticks=(-0.5, 0, 0.5))
        spectrum.tick_params(labelsize=8, length=2)
        patches = show_masked(patchify(photo[None], _PATCH), hidden[:1])
        seen = unpatchify(patches, _PATCH, _GRID)[0].nan_to_num(nan=0.93)
        visible.imshow(seen.permute(1, 2, 0).numpy())
        visible.set_title(f"pieces of {pieces:.1f} patches", fontsize=11.5)
        drawn.imshow(_board(model, digits[:_SHOWN]))
        drawn.set_title(f"error of hidden pixels {error:.2f}", fontsize=11.5)
        for ax in (noise, visible, drawn):
            ax.set(xticks=[], yticks=[])
        figures[color] = f"visible pieces of {pieces:.1f} patches; error of hidden pixels {error:.2f} of their variance"
    figures["training"] = f"{len(_COLORS)} autoencoders in {time.perf_counter() - begin:.0f} s"
    rows = ("noise", "its spectrum\n(cycles per pixel)", "what the encoder sees", "digit, seen, drawn")
    for ax, name in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(name, fontsize=13)
    figure.suptitle(
        "ColorMAE: the colour of noise decides how the visible patches hang together",
        fontsize=15.5,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=100)
    plt.close(figure)
    return figures


def _rng() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _digits() -> Tensor:
    """(n, 1, 8, 8) with mean 0 and variance 1, in random order; the first `_TESTED` are not trained on."""
    data = load_images("digits")
    pixels = torch.cat([data.test_images, data.train_images]).float()
    return (pixels - pixels.mean()) / pixels.std()


def _train(mask: ColorMask, digits: Tensor) -> tuple[MaskedAutoencoder, float]:
    """A model, and its mean squared error on the hidden pixels of test digits."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    model = masked_vit(_VIT, mask)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, _STEPS, pct_start=0.2)
    for _ in range(_STEPS):
        batch = torch.randint(_TESTED, len(digits), (_BATCH,), generator=rng)
        loss = model(digits[batch], rng).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return model, model(digits[:_TESTED], _rng()).loss.item()


def _board(model: MaskedAutoencoder, digits: Tensor) -> np.ndarray:
    """Digits in a row, below them what the encoder sees, and below that what the decoder draws; (H, W, 3)."""
    seen = model.pictures(digits, _rng())
    rows = []
    for images in (digits, seen["masked"], seen["reconstructed"]):
        row = F.pad(images[:, 0], (1, 1, 1, 1), value=torch.nan).permute(1, 0, 2).flatten(1)
        rows.append(row)
    board = torch.cat(rows)
    grey = ((board - digits.min()) / (digits.max() - digits.min())).clamp(0, 1)[..., None].expand(-1, -1, 3)
    return torch.where(board.isnan()[..., None], torch.tensor(_HIDDEN), grey).numpy()


_HIDDEN = (0.75, 0.82, 0.9)
