"""Mixture-of-Head attention on a photograph: which heads every patch chooses, and what the load-balance loss is for.

One layer learns to take noise out of the photograph, once with the load-balance loss and once without it.
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
from torch import Tensor, nn

from heed.demos.registry import Figures, demos, photograph
from heed.layers.moh import MoHAttention, collect_balance

_HEIGHT, _WIDTH, _PATCH = 144, 216, 6
_DIM, _HEADS, _SHARED, _ROUTED = 64, 8, 2, 2
_NOISE, _STEPS, _BALANCE = 0.15, 200, 0.01
_COLOURS = np.array(plt.get_cmap("Dark2").colors[:6])  # type: ignore[attr-defined]  # one per routed head


class _Denoiser(nn.Module):
    """Patches, a depthwise convolution for their places, one Mixture-of-Head layer, patches."""

    def __init__(self) -> None:
        super().__init__()
        pixels = 3 * _PATCH**2
        self.embed = nn.Linear(pixels, _DIM)
        self.places = nn.Conv2d(_DIM, _DIM, 3, padding=1, groups=_DIM)
        self.norm = nn.LayerNorm(_DIM)
        self.attention = MoHAttention(_DIM, _HEADS, shared=_SHARED, routed=_ROUTED)
        self.draw = nn.Linear(_DIM, pixels)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.embed(patches)
        x = self.norm(x + self.places(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.draw(self.attention(x))


@demos.register("27-moh")
def moh(picture: Path) -> Figures:
    """Train two one-layer denoisers, draw the heads that every patch chooses, and how often each head is chosen."""
    photo = torch.from_numpy(photograph(_HEIGHT, _WIDTH))
    colour = photo.mean((0, 1))
    clean = _to_patches(photo - colour)
    begin = time.perf_counter()
    balanced, alone = (_train(clean, weight) for weight in (_BALANCE, 0.0))
    seconds = time.perf_counter() - begin

    generator = torch.Generator().manual_seed(2)
    noisy = clean + _NOISE * torch.randn(clean.shape, generator=generator)
    with torch.no_grad(), collect_balance(balanced) as one, collect_balance(alone) as two:
        restored = balanced(noisy)
        alone(noisy)
    gates = one.routings[0][1].gates[0].unflatten(0, clean.shape[1:3])
    usage = [balance.usage()["attention"] for balance in (one, two)]

    figure = plt.figure(figsize=(14, 10.4), layout="constrained")
    top, bottom = cast(np.ndarray, figure.subfigures(2, 1, height_ratios=(1.2, 1)))
    ax = top.subplots(1, 2)
    _show(ax[0], _to_pixels(noisy) + colour, "What the layer sees")
    _choices(ax[1], gates, photo)
    panels = bottom.subplots(2, 4, width_ratios=(1, 1, 1, 1.2))
    for head in range(_HEADS - _SHARED):
        _gate_map(panels[head // 3, head % 3], gates[..., _SHARED + head], head, usage[0][head])
    for axis, share, title in zip(panels[:, 3], usage, ("With the load-balance loss", "Without it"), strict=True):
        _usage(axis, share, title)
    title = f"each patch uses {_SHARED} shared heads and chooses {_ROUTED} of the {_HEADS - _SHARED} others"
    figure.suptitle(f"Mixture-of-Head attention: {title}", fontsize=17, x=0.01, ha="left")
    figure.savefig(picture, dpi=105)
    plt.close(figure)
    entropies = [torch.special.entr(share / share.sum()).sum().div(np.log(len(share))).item() for share in usage]
    return {
        "setting": f"{clean.shape[1]} x {clean.shape[2]} patches of {_PATCH} x {_PATCH} pixels, {_HEADS} heads",
        "heads a patch uses": f"{_SHARED} shared + {_ROUTED} of {_HEADS - _SHARED} = {(_SHARED + _ROUTED) / _HEADS:.0%}",
        "peak signal-to-noise ratio": f"{_psnr(noisy, clean):.1f} dB before, {_psnr(restored, clean):.1f} dB after",
        "evenness of the routed heads (1 is even)": f"{entropies[0]:.2f} with the balance loss, {entropies[1]:.2f} without",
        "training": f"2 x {_STEPS} steps in {seconds:.0f} s",
    }


def _train(clean: Tensor, weight: float) -> _Denoiser:
    """A denoiser trained with `weight` times the load-balance loss."""
    torch.manual_seed(0)
    model = _Denoiser()
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    for _ in range(_STEPS):
        with collect_balance(model) as balance:
            loss = F.mse_loss(model(clean + _NOISE * torch.randn_like(clean)), clean)
        optimiser.zero_grad()
        (loss + weight * balance.loss()).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


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


def _show(ax: Axes, image: Tensor, title: str) -> None:
    ax.imshow(image.clamp(0, 1).numpy(), interpolation="nearest")
    ax.set_title(title)
    ax.set_axis_off()


def _choices(ax: Axes, gates: Tensor, photo: Tensor) -> None:
    """The strongest routed head of every patch, its brightness that of the photograph."""
    best = gates[..., _SHARED:].argmax(-1).numpy()
    painted = _COLOURS[best].repeat(_PATCH, 0).repeat(_PATCH, 1)
    light = photo.mean(-1, keepdim=True).numpy()
    ax.imshow(np.clip(painted * (0.25 + 1.5 * light), 0, 1))
    ax.set_title("The head that each patch weighs most")
    ax.set_axis_off()


def _gate_map(ax: Axes, gate: Tensor, head: int, share: Tensor) -> None:
    """Where a head is chosen and how strongly: white where it is not computed at all."""
    strength = (gate / gate.quantile(0.99)).clamp(0, 1).numpy()[..., None]
    ax.imshow(1 - strength * (1 - _COLOURS[head]), interpolation="nearest")
    ax.set_title(f"head {_SHARED + head + 1}: {share.item():.0%} of the patches", color=_COLOURS[head], fontsize=11)
    ax.set(xticks=(), yticks=())
    ax.spines[:].set_color("lightgray")


def _usage(ax: Axes, share: Tensor, title: str) -> None:
    names = [str(_SHARED + head + 1) for head in range(len(share))]
    bars = ax.bar(names, 100 * share.numpy(), color=_COLOURS)
    ax.bar_label(bars, fmt="%.0f", fontsize=9)
    ax.axhline(100 * _ROUTED / len(share), color="gray", linewidth=1, linestyle=":")
    ax.set_title(title, fontsize=12, loc="left")
    ax.set(ylim=(0, 115), yticks=(), ylabel="% of the patches")
    ax.spines[["top", "right", "left"]].set_visible(False)
