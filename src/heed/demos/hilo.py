"""HiLo attention on a photograph: one layer learns to remove noise, and each branch shows what it has drawn."""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn

from heed.demos.registry import Figures, demos, photograph
from heed.layers.hilo import HiLoAttention, radial_spectrum

_HEIGHT, _WIDTH, _PATCH = 144, 216, 4
_DIM, _HEADS = 96, 6
_NOISE = 0.15  # standard deviation; the photograph lies in [0, 1]
_STEPS = 400
_HIGH, _LOW = "#D55E00", "#0072B2"


class _Denoiser(nn.Module):
    """Patches, a 3x3 depthwise convolution for their places, one HiLo layer, patches: no way around the attention."""

    def __init__(self) -> None:
        super().__init__()
        pixels = 3 * _PATCH**2
        self.embed = nn.Linear(pixels, _DIM)
        self.places = nn.Conv2d(_DIM, _DIM, 3, padding=1, groups=_DIM)
        self.norm = nn.LayerNorm(_DIM)
        self.attention = HiLoAttention(_DIM, _HEADS, qkv_bias=True, window_size=2, alpha=0.5)
        self.draw = nn.Linear(_DIM, pixels)

    def tokens(self, patches: Tensor) -> Tensor:
        x = self.embed(patches)
        return self.norm(x + self.places(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def forward(self, patches: Tensor) -> Tensor:
        return self.draw(self.attention(self.tokens(patches)))


@demos.register("23-hilo")
def hilo(picture: Path) -> Figures:
    """Train a one-layer denoiser, draw what its Hi-Fi and Lo-Fi heads contribute, and compare their spectra."""
    torch.manual_seed(0)
    photo = torch.from_numpy(photograph(_HEIGHT, _WIDTH))
    colour = photo.mean((0, 1))
    clean = _to_patches(photo - colour)
    model, begin = _Denoiser(), time.perf_counter()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    for _ in range(_STEPS):
        loss = F.mse_loss(model(clean + _NOISE * torch.randn_like(clean)), clean)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    seconds = time.perf_counter() - begin

    noisy = clean + _NOISE * torch.randn_like(clean)
    with torch.no_grad():
        restored = model(noisy)
        branches = model.attention.branches(model.tokens(noisy))
        weights = model.draw.weight.split([branch.shape[-1] for branch in branches], 1)
        # What a branch draws, less its average over the tokens, which the picture as a whole shares.
        high, low = (
            _to_pixels((y - y.mean((1, 2), keepdim=True)) @ w.T) for y, w in zip(branches, weights, strict=True)
        )
    spectra = [radial_spectrum(branch) for branch in branches]

    figure, axes = plt.subplot_mosaic(
        [["noisy", "high", "fft high"], ["restored", "low", "fft low"], ["spectrum"] * 3],
        figsize=(13.2, 9.6),
        height_ratios=(1, 1, 0.75),
        layout="constrained",
    )
    _show(axes["noisy"], _to_pixels(noisy) + colour, "What the layer sees")
    _show(axes["restored"], _to_pixels(restored) + colour, "What it returns: the two drawings added up")
    _show(axes["high"], 1.5 * high + 0.5, "Drawn by the Hi-Fi heads, inside 2 x 2 windows", _HIGH)
    _show(axes["low"], 1.5 * low + 0.5, "Drawn by the Lo-Fi heads, from pooled tokens", _LOW)
    magnitudes = [_log_magnitude(branch) for branch in branches]
    top = max(m.max() for m in magnitudes)
    for name, magnitude, colour_of in zip(("high", "low"), magnitudes, (_HIGH, _LOW), strict=True):
        ax = axes[f"fft {name}"]
        ax.imshow(magnitude, cmap="magma", vmin=top - 2.5, vmax=top, extent=(-0.5, 0.5, -0.5, 0.5), aspect="auto")
        ax.set_title(f"{'Hi-Fi' if name == 'high' else 'Lo-Fi'}: log magnitude of its frequencies", color=colour_of)
        ax.set(xticks=(-0.5, 0, 0.5), yticks=(-0.5, 0, 0.5), xlabel="cycles per token")
    _draw_spectra(axes["spectrum"], spectra)
    figure.suptitle(
        "HiLo attention: without being told, its heads share the work by frequency", fontsize=17, x=0.01, ha="left"
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)

    rows, columns = clean.shape[1:3]
    dense = HiLoAttention(_DIM, _HEADS, window_size=1).flops(rows, columns)
    return {
        "setting": f"{rows} x {columns} tokens of {_PATCH} x {_PATCH} pixels, {_HEADS} heads, window 2, alpha 0.5",
        "peak signal-to-noise ratio": f"{_psnr(noisy, clean):.1f} dB before, {_psnr(restored, clean):.1f} dB after",
        "energy above a quarter cycle per token": " and ".join(
            f"{name} {_fast_share(*spectrum):.0%}" for name, spectrum in zip(("Hi-Fi", "Lo-Fi"), spectra, strict=True)
        ),
        "multiply-adds": f"{model.attention.flops(rows, columns) / 1e6:.0f} M, full attention {dense / 1e6:.0f} M",
        "training": f"{_STEPS} steps in {seconds:.0f} s",
    }


def _to_patches(image: Tensor) -> Tensor:
    """(H, W, 3) -> (1, H/p, W/p, p*p*3)"""
    rows, columns = image.shape[0] // _PATCH, image.shape[1] // _PATCH
    return image.view(rows, _PATCH, columns, _PATCH, 3).transpose(1, 2).reshape(1, rows, columns, -1)


def _to_pixels(patches: Tensor) -> Tensor:
    """(1, H/p, W/p, p*p*3) -> (H, W, 3)"""
    _, rows, columns, _ = patches.shape
    return patches.view(rows, columns, _PATCH, _PATCH, 3).transpose(1, 2).reshape(_HEIGHT, _WIDTH, 3)


def _psnr(image: Tensor, clean: Tensor) -> float:
    return -10 * F.mse_loss(image, clean).log10().item()


def _fast_share(frequency: Tensor, energy: Tensor) -> float:
    return (energy[frequency > 0.25].sum() / energy.sum()).item()


def _log_magnitude(branch: Tensor) -> np.ndarray:
    """(H, W) log10 of the mean magnitude over channels, frequency 0 in the middle and left out."""
    magnitude = torch.fft.fft2(branch - branch.mean((1, 2), keepdim=True), dim=(1, 2)).abs().mean((0, 3))
    magnitude[0, 0] = magnitude[0, 1]
    return torch.fft.fftshift(magnitude).log10().numpy()


def _show(ax: Axes, image: Tensor, title: str, colour: str = "black") -> None:
    ax.imshow(image.clamp(0, 1).numpy())
    ax.set_title(title, color=colour)
    ax.set_axis_off()


def _draw_spectra(ax: Axes, spectra: list[tuple[Tensor, Tensor]]) -> None:
    labels = ("Hi-Fi", _HIGH, 9), ("Lo-Fi", _LOW, -32)
    for (frequency, energy), (name, colour, above) in zip(spectra, labels, strict=True):
        share = (energy / energy.sum()).numpy()
        ax.semilogy(frequency, share, "o-", color=colour, linewidth=2.2)
        ax.annotate(
            f"{name}: {_fast_share(frequency, energy):.0%} above 0.25",
            (float(frequency[6]), share[6]),
            (0, above),
            textcoords="offset points",
            color=colour,
            fontsize=12,
            fontweight="bold",
        )
    ax.axvline(0.25, color="gray", linewidth=1, linestyle=":")
    ax.set(xlabel="spatial frequency (cycles per token)", ylabel="share of a branch's energy")
    ax.spines[["top", "right"]].set_visible(False)
