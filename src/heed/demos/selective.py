"""Selective attention on a photograph with broken patches: which patches ask sharply, and which speak louder than others."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn

from heed.demos.registry import Figures, demos, photograph
from heed.layers.selective import SelectiveAttention
from heed.layers.temperature import Selective, spikiness

_HEIGHT, _WIDTH, _PATCH = 120, 180, 6
_ROWS, _COLUMNS = _HEIGHT // _PATCH, _WIDTH // _PATCH
_DIM, _HEADS = 96, 4
_BROKEN, _STEPS = 0.3, 700
_COLD, _HOT = "#0072B2", "#D55E00"


class _Repair(nn.Module):
    """Patches and their places, one layer of attention, patches: a broken patch has to be made from others."""

    def __init__(self) -> None:
        super().__init__()
        pixels = 3 * _PATCH**2
        self.embed, self.draw = nn.Linear(pixels, _DIM), nn.Linear(_DIM, pixels)
        self.places = nn.Parameter(0.3 * torch.randn(_ROWS * _COLUMNS, _DIM))
        self.read = nn.Sequential(nn.Linear(_DIM, _DIM), nn.GELU(), nn.LayerNorm(_DIM))
        settings = Selective(query=("token",), value=("token",), scratch=True)
        self.attention = SelectiveAttention(_DIM, _HEADS, settings=settings)

    def tokens(self, patches: Tensor) -> Tensor:
        return self.read(self.embed(patches) + self.places)

    def forward(self, patches: Tensor) -> Tensor:
        return self.draw(self.attention(self.tokens(patches)))


@demos.register("18-selective-ssa")
def selective(picture: Path) -> Figures:
    """Train a layer to repair broken patches, and draw the temperatures that it learned for queries and values."""
    torch.manual_seed(0)
    photo = torch.from_numpy(photograph(_HEIGHT, _WIDTH))
    clean = _to_patches(photo)
    model = _Repair()
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, _STEPS)
    for _ in range(_STEPS):
        loss = F.mse_loss(model(_break(clean)[0]), clean)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()

    given, broken = _break(clean)
    with torch.no_grad():
        tokens = model.tokens(given)
        tau = model.attention.temperatures(tokens, model.attention.positions(len(clean[0])))
        repaired, weights = model(given), _weights(model.attention, tokens, tau["query"])
    query, value = tau["query"][0], tau["value"][0].mean(0)
    head = int(query.std(-1).argmax())
    effective = spikiness(weights[0, head]) * weights.shape[-1]
    whole = (~broken[0]).nonzero().flatten()
    sharp, even = whole[effective[whole].argsort()[10]], whole[effective[whole].argmax()]

    figure, axes = plt.subplots(2, 3, figsize=(15.5, 7.4), layout="constrained")
    _show(axes[0, 0], _to_image(given), f"{_BROKEN:.0%} of the patches are noise")
    _show(axes[0, 1], _to_image(repaired), "Repaired by one layer of selective attention")
    chosen = weights[0, head]
    _attended(axes[0, 2], photo, chosen, int(sharp), int(even), effective)
    _heat(axes[1, 0], query[head], f"Temperature of the queries, head {head + 1}: high asks sharply", "inferno")
    _heat(axes[1, 1], value, "Temperature of the values, mean of the heads: high speaks louder", "inferno")
    for where, colour, name in ((~broken[0], _COLD, "whole patches"), (broken[0], _HOT, "broken patches")):
        axes[1, 2].plot(query[head, where], effective[where], "o", color=colour, alpha=0.5, markersize=4, label=name)
    axes[1, 2].set(title="The hotter a query, the fewer patches it reads", yscale="log")
    axes[1, 2].set(xlabel=f"temperature of the query, head {head + 1}", ylabel="patches that it really reads")
    axes[1, 2].spines[["top", "right"]].set_visible(False)
    axes[1, 2].legend(frameon=False)
    title = "every patch has a temperature for what it asks, and one for what it has to say"
    figure.suptitle(f"Selective attention: {title}", fontsize=17, x=0.01, ha="left")
    figure.savefig(picture, dpi=105)
    plt.close(figure)

    both = {name: _psnr(x[broken], clean[broken]) for name, x in (("given", given), ("repaired", repaired))}
    return {
        "setting": f"{clean.shape[1]} patches of {_PATCH} x {_PATCH} pixels, {_HEADS} heads, {_STEPS} steps",
        "broken patches, PSNR": f"{both['given']:.1f} dB, repaired {both['repaired']:.1f} dB",
        "temperature of queries": f"{query.min():.2f} to {query.max():.2f}, of values {value.min():.2f} to {value.max():.2f}",
        "patches that a query really reads": f"{effective.min():.0f} to {effective.max():.0f}, by its temperature and keys",
    }


def _break(clean: Tensor) -> tuple[Tensor, Tensor]:
    """Patches of which some are noise, and which ones (1, N)."""
    broken = torch.rand(clean.shape[:2]) < _BROKEN
    return torch.where(broken[..., None], torch.rand_like(clean), clean), broken


def _weights(layer: SelectiveAttention, x: Tensor, tau: Tensor) -> Tensor:
    """(B, H, N, N) attention weights of a layer whose queries have these temperatures."""
    q, k = (p(x).unflatten(-1, (_HEADS, -1)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
    return (tau[..., None] * q @ k.mT * layer.head_dim**-0.5).softmax(-1)


def _to_patches(image: Tensor) -> Tensor:
    return F.unfold(image.permute(2, 0, 1)[None], _PATCH, stride=_PATCH).mT


def _to_image(patches: Tensor) -> Tensor:
    return F.fold(patches.mT, (_HEIGHT, _WIDTH), _PATCH, stride=_PATCH)[0].permute(1, 2, 0)


def _psnr(image: Tensor, clean: Tensor) -> float:
    return -10 * F.mse_loss(image, clean).log10().item()


def _show(ax: Axes, image: Tensor, title: str) -> None:
    ax.imshow(image.clamp(0, 1).numpy())
    ax.set_title(title, fontsize=11)
    ax.set_axis_off()


def _heat(ax: Axes, values: Tensor, title: str, colours: str) -> None:
    drawn = ax.imshow(values.view(_ROWS, _COLUMNS).numpy(), cmap=colours)
    ax.figure.colorbar(drawn, ax=ax, fraction=0.03, pad=0.01)
    ax.set_title(title, fontsize=11)
    ax.set_axis_off()


def _attended(ax: Axes, photo: Tensor, weights: Tensor, sharp: int, even: int, effective: Tensor) -> None:
    """The photograph, dim, with what a sharp and an even query read in two colours."""
    image = photo.mean(-1, keepdim=True).numpy() * np.ones(3) * 0.5 + 0.2
    for query, colour, most in ((even, _COLD, 0.35), (sharp, _HOT, 0.9)):  # an even query would hide the picture
        seen = weights[query].view(1, 1, _ROWS, _COLUMNS)
        seen = (F.interpolate(seen, (_HEIGHT, _WIDTH))[0, 0] / seen.max()).sqrt().mul(most).numpy()[..., None]
        image = image * (1 - seen) + np.array(plt.matplotlib.colors.to_rgb(colour)) * seen  # type: ignore[attr-defined]
    ax.imshow(image)
    for query, colour, name in ((even, _COLD, "even"), (sharp, _HOT, "sharp")):
        row, column = divmod(query, _COLUMNS)
        centre = (column + 0.5) * _PATCH, (row + 0.5) * _PATCH
        ax.plot(
            *centre, "o", color=colour, markeredgecolor="white", markersize=9, label=f"{name}: {effective[query]:.0f}"
        )
    ax.legend(title="patches read by a query", loc="upper right", fontsize=9)
    ax.set_title("What two queries (dots) read", fontsize=11)
    ax.set_axis_off()
