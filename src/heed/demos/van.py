"""Large kernel attention on a photograph: how far it reaches shows in how well it fills in pixels that are missing."""

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
from heed.layers.lka import LKA, VANAttention, lka_costs

_SIZE = (144, 216)
_KEPT = 0.12  # share of the pixels that the networks get to see
_DIM, _STEPS, _CROP, _BATCH = 20, 240, 48, 4
_KERNELS = {"3 x 3": (3, 1), "23 x 23": (21, 3)}  # what a gate sees: (kernel_size, dilation)
_BLUE, _ORANGE = "#0072B2", "#D55E00"


class _Painter(nn.Module):
    """Two attention modules, after norms, between 1 x 1 convolutions: only their gates carry colour between pixels."""

    def __init__(self, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(4, _DIM, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(_DIM) for _ in range(2))
        self.attention = nn.ModuleList(VANAttention(_DIM, kernel_size, dilation) for _ in range(2))
        self.draw = nn.Conv2d(_DIM, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, attention in zip(self.norms, self.attention, strict=True):
            x = x + attention(norm(x))
        return self.draw(x)

    def gates(self, x: Tensor) -> Tensor:
        """(C, H, W) what the first attention multiplies by, for one image."""
        first = cast(VANAttention, self.attention[0])
        return first.spatial_gating_unit.gate(F.gelu(first.proj_1(self.norms[0](self.embed(x)))))[0]


@demos.register("25-van")
def van(picture: Path) -> Figures:
    """Train two small networks to fill in missing pixels, with short and with long reach, and draw what they return."""
    torch.manual_seed(0)
    photo = torch.from_numpy(photograph(*_SIZE)).permute(2, 0, 1)[None]
    colour = photo.mean((0, 2, 3), keepdim=True)
    seen = _hide(photo - colour)
    restored, models, seconds = {}, {}, {}
    for name, kernels in _KERNELS.items():
        begin = time.perf_counter()
        models[name] = _train(_Painter(*kernels), photo - colour)
        seconds[name] = time.perf_counter() - begin
        with torch.no_grad():
            restored[name] = models[name](seen) + colour
    with torch.no_grad():
        gates = models["23 x 23"].gates(seen)

    figure = plt.figure(figsize=(13, 9.6), layout="constrained")
    top, bottom = cast(np.ndarray, figure.subfigures(2, 1, height_ratios=(1, 1.9)))
    axes = top.subplot_mosaic([["local", "spread", "both", "cost"]]) | bottom.subplot_mosaic(
        [["seen", "near", "far"], ["photo", "gate", "other"]]
    )
    _draw_kernels(axes["local"], axes["spread"], axes["both"])
    costs = lka_costs(64, 56, 56)
    _draw_costs(axes["cost"], {name: cost.parameters for name, cost in costs.items()})
    quality = {name: _psnr(image, photo) for name, image in restored.items()}
    _show(axes["seen"], seen[:, :3] + colour * seen[:, 3:], f"The input: {_KEPT:.0%} of the pixels")
    _show(axes["near"], restored["3 x 3"], f"Filled in with gates of 3 x 3: {quality['3 x 3']:.1f} dB", _ORANGE)
    _show(axes["far"], restored["23 x 23"], f"Filled in with gates of 23 x 23: {quality['23 x 23']:.1f} dB", _BLUE)
    _show(axes["photo"], photo, "The photograph")
    strongest, other = _two_gates(gates)
    _draw_gate(axes["gate"], gates[strongest], "What a 23 x 23 gate multiplies by: red > 0, blue < 0")
    _draw_gate(axes["other"], gates[other], "Another channel's gate")
    figure.suptitle(
        "Large kernel attention: two depthwise convolutions and a 1 x 1 make a gate that sees 23 x 23 pixels",
        fontsize=17,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=100)
    plt.close(figure)
    return {
        "setting": f"{_SIZE[0]} x {_SIZE[1]} pixels, {_KEPT:.0%} kept, {_DIM} channels, two attention modules",
        **{f"gates that see {name}": f"{quality[name]:.2f} dB, trained in {seconds[name]:.0f} s" for name in _KERNELS},
        **{
            f"64 channels, 56 x 56: {name}": f"{c.parameters:,} parameters, {c.multiply_adds / 1e6:,.0f} M multiply-adds"
            for name, c in costs.items()
        },
    }


def _hide(image: Tensor) -> Tensor:
    """(B, 3, H, W) to the pixels that are kept, 0 elsewhere, and where they are: (B, 4, H, W)."""
    kept = (torch.rand_like(image[:, :1]) < _KEPT).float()
    return torch.cat([image * kept, kept], 1)


def _train(model: _Painter, image: Tensor) -> _Painter:
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, _STEPS)
    for _ in range(_STEPS):
        corners = [tuple(int(torch.randint(side - _CROP + 1, ())) for side in _SIZE) for _ in range(_BATCH)]
        crops = torch.cat([image[..., r : r + _CROP, c : c + _CROP] for r, c in corners])
        loss = F.mse_loss(model(_hide(crops)), crops)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


def _draw_kernels(local: Axes, spread: Axes, both: Axes) -> None:
    """The taps of the two depthwise convolutions, and in how many ways a pixel reaches the gate through them."""
    layer = LKA(1)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, float(parameter.ndim > 1))
    impulse = torch.zeros(1, 1, 27, 27)
    impulse[..., 13, 13] = 1
    with torch.no_grad():
        pictures = (layer.conv0(impulse), layer.conv_spatial(impulse), layer.gate(impulse))
    titles = ("5 x 5", "7 x 7, every third pixel", f"together: all of {layer.support} x {layer.support}")
    for ax, ways, title in zip((local, spread, both), pictures, titles, strict=True):
        ax.imshow(ways[0, 0], cmap="Blues", vmin=0, vmax=max(1.4, ways.max().item()), extent=(-13.5, 13.5, 13.5, -13.5))
        ax.set_title(title, fontsize=12)
        ax.set(xticks=(-11, 0, 11), yticks=(-11, 0, 11))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)


def _draw_costs(ax: Axes, parameters: dict[str, int]) -> None:
    names = ["lka", "self-attention", "depthwise convolution", "dense convolution"]
    labels = ["LKA", "attention", "depthwise\n21 x 21", "dense\n21 x 21"]
    values = [parameters[name] for name in names]
    ax.barh(labels, values, color=[_BLUE, "silver", "silver", "silver"])
    for i, value in enumerate(values):
        ax.annotate(f"{value:,}", (value, i), (5, 0), textcoords="offset points", va="center", fontsize=10)
    ax.set_xscale("log")
    ax.set_xlim(3e3, 6e7)
    ax.invert_yaxis()
    ax.set_title("Parameters at 64 channels", fontsize=12)
    ax.spines[["top", "right"]].set_visible(False)


def _two_gates(gates: Tensor) -> tuple[int, int]:
    """Of the gates (C, H, W) that vary most, the first and the one least like it."""
    flat = gates.flatten(1)
    lively = flat.std(1).topk(_DIM // 2).indices
    alike = torch.corrcoef(flat[lively])[0].abs()
    return int(lively[0]), int(lively[alike.argmin()])


def _draw_gate(ax: Axes, gate: Tensor, title: str) -> None:
    reach = float(np.quantile(gate.abs(), 0.99))
    ax.imshow(gate, cmap="RdBu_r", vmin=-reach, vmax=reach)
    ax.set_title(title, fontsize=12)
    ax.set_axis_off()


def _show(ax: Axes, image: Tensor, title: str, colour: str = "black") -> None:
    ax.imshow(image[0].permute(1, 2, 0).clamp(0, 1).numpy())
    ax.set_title(title, fontsize=13, color=colour)
    ax.set_axis_off()


def _psnr(image: Tensor, clean: Tensor) -> float:
    return -10 * F.mse_loss(image, clean).log10().item()
