"""Subsampled attention on a photograph: which pixels are sources in one draw, and what the average of many draws sees.

Attention whose queries and keys are the surroundings of a pixel, and whose values are its colours, takes noise out of a
picture (non-local means). Where all pixels are sources, a pixel looks most like itself and keeps its noise; a draw without it
has to look elsewhere, and several draws together do so best.
"""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from heed.demos.registry import Figures, demos, photograph
from heed.language.self_ensemble import average_members
from heed.layers.subsampled import Draw
from heed.layers.subsampling import Subsampling, subsampled_cost

_HEIGHT, _WIDTH = 84, 126
_TOKENS = _HEIGHT * _WIDTH
_GRID = (_HEIGHT, _WIDTH)
_NOISE, _SIDE, _SHARPNESS = 0.12, 5, 3.0
_RATIO = 8
_TARGET = (36, 90)  # row and column of the pixel whose sources are drawn: an eye of the cat
_MEMBERS = (1, 4, 16)
_MARK = "#FFB000"


@demos.register("41-subsampled-ssa")
def subsampled(picture: Path) -> Figures:
    """Draw the sources of one pixel under several draws, and what one, four and sixteen draws make of noise."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.from_numpy(photograph(_HEIGHT, _WIDTH))
    noisy = clean + _NOISE * torch.randn(clean.shape, generator=generator)
    q, k, v = _tokens(noisy)
    unbiased = Subsampling("unbiased", ratio=_RATIO)
    windows = Subsampling("local", window=(28, 42), sigma=300.0)
    draws = [unbiased.draw(1, _TOKENS, generator=generator) for _ in range(max(_MEMBERS))]
    local = windows.draw(1, _TOKENS, generator=generator, grid=_GRID)
    far = Subsampling("local", ratio=_RATIO, sigma=_TOKENS / 8).draw(1, _TOKENS, generator=generator)

    begin = time.perf_counter()
    dense = Subsampling(ratio=1).draw(1, _TOKENS).attend(q, k, v, scale=1.0)
    middle = time.perf_counter()
    members = [draw.attend(q, k, v, scale=1.0) for draw in draws]
    end = time.perf_counter()

    figure, axes = plt.subplots(2, 4, figsize=(17, 6.6), layout="constrained")
    _seen(axes[0, 0], clean, [draws[0]], f"One draw: 1 / {_RATIO} of the pixels, for all targets")
    _seen(axes[0, 1], clean, draws[:8], f"What 8 layers read: all but {_unread(draws[:8]):.0%}")
    _seen(axes[0, 2], clean, [local], "Local, windows: what one pixel sees")
    _seen(axes[0, 3], clean, [far], "Local, rows, with more noise in the shuffle")
    psnr = {}
    for ax, number in zip(axes[1], _MEMBERS, strict=False):
        mean = average_members(members[:number], "values")
        psnr[number] = _draw(ax, mean, clean, "one draw" if number == 1 else f"{number} draws, averaged")
    psnr["dense"] = _draw(axes[1, 3], dense, clean, "all pixels, mostly itself")
    title = (
        f"every target reads 1 / {_RATIO} of the pixels, a new draw each time; above the sources, below noise taken out"
    )
    figure.suptitle(f"Subsampled attention: {title}", fontsize=16, x=0.01, ha="left")
    figure.savefig(picture, dpi=105)
    plt.close(figure)

    cost = subsampled_cost(unbiased, _TOKENS, 1, q.shape[-1])
    return {
        "setting": f"{_TOKENS} pixels, {unbiased.size(_TOKENS)} sources in a draw",
        "noise": f"{_psnr(noisy, clean):.1f} dB with it, "
        + ", ".join(f"{psnr[number]:.1f} dB by {number}" for number in _MEMBERS)
        + f" draws, {psnr['dense']:.1f} dB by all pixels",
        "operations": f"{cost.flops / 1e9:.1f} G a draw, dense {cost.dense_flops / 1e9:.1f} G",
        "time": f"{(end - middle) / len(draws) * 1e3:.0f} ms a draw, dense {(middle - begin) * 1e3:.0f} ms",
    }


def _tokens(noisy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, 1, pixels, D): q_i . k_j falls with the squared distance of the surroundings of i and j."""
    image = F.pad(noisy.permute(2, 0, 1)[None], (_SIDE // 2,) * 4, mode="reflect")
    around = F.unfold(image, _SIDE)[0].T
    around = _SHARPNESS * (around - around.mean(0)) / (_NOISE * around.shape[1] ** 0.5)
    norms = -around.square().sum(1, keepdim=True) / 2
    q, k = torch.cat([around, torch.ones_like(norms)], 1), torch.cat([around, norms], 1)
    v = F.pad(noisy.view(-1, 3), (0, q.shape[1] - 3))
    return q[None, None], k[None, None], v[None, None]


def _sources(draws: list[Draw]) -> Tensor:
    """(rows, columns) which pixels the target reads in any of the draws."""
    row = _TARGET[0] * _WIDTH + _TARGET[1]
    seen = torch.stack([draw.kept(_TOKENS, _TOKENS)[0, 0, row] for draw in draws])
    return seen.any(0).view(_HEIGHT, _WIDTH)


def _unread(draws: list[Draw]) -> float:
    return 1 - _sources(draws).float().mean().item()


def _seen(ax: Axes, image: Tensor, draws: list[Draw], title: str) -> None:
    """The photograph where it is read, grey elsewhere, and the target."""
    kept = _sources(draws)[..., None]
    grey = image.mean(-1, keepdim=True).expand_as(image) * 0.25 + 0.08
    ax.imshow(torch.where(kept, image, grey).numpy(), interpolation="nearest")
    ax.plot(_TARGET[1], _TARGET[0], "o", color=_MARK, markersize=9, markeredgecolor="black")
    ax.set_title(title, fontsize=11)
    ax.set_axis_off()


def _draw(ax: Axes, out: Tensor, clean: Tensor, title: str) -> float:
    image = out[0, 0, :, :3].view(clean.shape)
    quality = _psnr(image, clean)
    ax.imshow(image.clamp(0, 1).numpy())
    ax.set_title(f"Noise taken out by {title}: {quality:.1f} dB", fontsize=11)
    ax.set_axis_off()
    return quality


def _psnr(image: Tensor, clean: Tensor) -> float:
    return -10 * float(np.log10(F.mse_loss(image, clean).item()))
