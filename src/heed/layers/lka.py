"""Large kernel attention (card 25): every channel is gated by three small convolutions that together see 23 x 23 pixels.

    A = W (DW-D-Conv(DW-Conv(x))),   y = x * A                  x, A, y (B, C, H, W)

With kernel K and dilation d, DW-Conv is depthwise (2d - 1) x (2d - 1), DW-D-Conv is depthwise ceil(K / d) x ceil(K / d)
with dilation d, W is C x C. A is neither normalised nor bounded, and may be negative. In VAN the gate works between two
1 x 1 convolutions, around which its input passes unchanged:

    z = GELU(W_1 x),   y = W_2 (z * A(z)) + x

Guo, Lu, Liu, Cheng, Hu, "Visual Attention Network", Computational Visual Media 2023, arXiv 2202.09741. Parameter names
are the authors'. The paper says K = 21 of (K, d) = (21, 3); what the gate really sees is 4 * 1 + 6 * 3 + 1 = 23 pixels.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.layers.registry import layers

COMBINATIONS = ("multiply", "add", "none", "sigmoid")
CONVOLUTIONS = ("conv0", "conv_spatial", "conv1")


class SpreadConv2d(nn.Conv2d):
    """A depthwise convolution with dilation d and as many pixels after it, (B, C, H, W) -> (B, C, H, W).

    On a CPU the d x d maps that hold every d-th pixel of a map are convolved apart and without dilation: the same sums,
    for which its kernels are faster. Compiled and exported graphs get the one convolution.
    """

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        d = self.dilation[0]
        if d == 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        channels, height, width = x.shape[1:]
        x = F.pad(x, (0, -width % d, 0, -height % d)).permute(0, 2, 3, 1)
        x = x.unflatten(2, (-1, d)).unflatten(1, (-1, d)).permute(0, 2, 4, 1, 3, 5)  # (B, d, d, h, w, C)
        padding = [size // 2 for size in self.kernel_size]
        y = F.conv2d(x.flatten(0, 2).permute(0, 3, 1, 2), self.weight, self.bias, padding=padding, groups=channels)
        y = y.permute(0, 2, 3, 1).reshape(x.shape).permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)
        return y[:, :height, :width].permute(0, 3, 1, 2)


@provides("25-van")
class LKA(nn.Module):
    """Large kernel attention on feature maps, (B, dim, H, W) -> (B, dim, H, W); the border is padded with zeros.

    The gate is unbounded, so products may overflow in float16: use bfloat16, or autocast.

    Args:
        dim: channels C.
        kernel_size: K, the nominal side of the large kernel in pixels; ceil(K / dilation) must be odd.
        dilation: d, step between the taps of the dilated convolution in pixels.
        combine: what becomes of the gate A: "multiply" is x * A; the paper's ablations are "add" (x + A), "none" (A
            alone) and "sigmoid" (x * sigmoid(A)). The authors released no code for these.
        omit: convolutions to leave out, the paper's other ablations: "conv0" (depthwise), "conv_spatial" (depthwise
            with dilation), "conv1" (1 x 1).

    Raises:
        ValueError: kernel_size and dilation that give an even kernel, or a setting that does not exist.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 21,
        dilation: int = 3,
        *,
        combine: str = "multiply",
        omit: Collection[str] = (),
    ) -> None:
        super().__init__()
        if combine not in COMBINATIONS:
            raise ValueError(unknown("combine", combine, COMBINATIONS))
        for name in omit:
            if name not in CONVOLUTIONS:
                raise ValueError(unknown("convolution to omit", name, CONVOLUTIONS))
        local, spread = _kernels(kernel_size, dilation)
        self.dim = dim
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.combine = combine
        self.conv0 = nn.Identity() if "conv0" in omit else _depthwise(dim, local)
        self.conv_spatial = nn.Identity() if "conv_spatial" in omit else _depthwise(dim, spread, dilation)
        self.conv1 = nn.Identity() if "conv1" in omit else nn.Conv2d(dim, dim, 1)

    @property
    def support(self) -> int:
        """Side in pixels of the square that the gate of a pixel depends on: 23 for (21, 3)."""
        reach = [
            (conv.kernel_size[0] - 1) * conv.dilation[0]
            for conv in (self.conv0, self.conv_spatial)
            if isinstance(conv, nn.Conv2d)
        ]
        return 1 + sum(reach)

    def gate(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """A, what the input is multiplied by."""
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"input {tuple(x.shape)}: {type(self).__name__} takes maps (B, {self.dim}, H, W)")
        return self.conv1(self.conv_spatial(self.conv0(x)))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        gate = self.gate(x)
        match self.combine:
            case "multiply":
                return x * gate
            case "add":
                return x + gate
            case "sigmoid":
                return x * gate.sigmoid()
        return gate

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, combine={self.combine!r}"


@provides("25-van")
class VANAttention(nn.Module):
    """1 x 1 convolution, GELU, LKA, 1 x 1 convolution, plus the input: (B, dim, H, W) -> (B, dim, H, W).

    Args:
        dim: channels C.
        kernel_size, dilation, combine, omit: as in `LKA`.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 21,
        dilation: int = 3,
        *,
        combine: str = "multiply",
        omit: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.dim = dim
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.spatial_gating_unit = LKA(dim, kernel_size, dilation, combine=combine, omit=omit)
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"input {tuple(x.shape)}: {type(self).__name__} has dim={self.dim} channels")
        return self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x)))) + x


@provides("25-van")
class LargeKernelAttention(VANAttention):
    """`VANAttention` on a grid of tokens, (B, H, W, C) -> (B, H, W, C): in the place of self-attention."""

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@provides("25-van")
@dataclass(frozen=True)
class MixerCost:
    """What a layer that mixes C channels of H x W pixels costs.

    Args:
        parameters: weights and biases.
        multiply_adds: per image, biases not counted.
    """

    parameters: int
    multiply_adds: int


@provides("25-van")
def lka_costs(dim: int, height: int, width: int, kernel_size: int = 21, dilation: int = 3) -> dict[str, MixerCost]:
    """Large kernel attention beside what it stands in for, on a map of height x width pixels and `dim` channels.

    Returns:
        "lka"; "dense convolution" and "depthwise convolution", one kernel of kernel_size x kernel_size; and
        "self-attention" between all pixels, with its four projections.
    """
    local, spread = _kernels(kernel_size, dilation)
    pixels, window = height * width, kernel_size**2
    taps = local**2 + spread**2
    return {
        "lka": MixerCost(dim * (taps + dim + 3), pixels * dim * (taps + dim)),
        "depthwise convolution": MixerCost(dim * (window + 1), pixels * dim * window),
        "dense convolution": MixerCost(dim * (window * dim + 1), pixels * dim * dim * window),
        "self-attention": MixerCost(4 * dim * (dim + 1), pixels * (4 * dim * dim + 2 * pixels * dim)),
    }


def _kernels(kernel_size: int, dilation: int) -> tuple[int, int]:
    """Sides of the two depthwise convolutions."""
    for name, value in (("kernel_size", kernel_size), ("dilation", dilation)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer >= 1")
    spread = -(-kernel_size // dilation)
    if spread % 2 == 0:
        raise ValueError(
            f"kernel_size={kernel_size} with dilation={dilation} gives an even dilated kernel of {spread} x {spread}, "
            f"which has no middle; kernel_size={(spread - 1) * dilation} or {(spread + 1) * dilation} with "
            f"dilation={dilation} would do, or the paper's (21, 3)"
        )
    return 2 * dilation - 1, spread


def _depthwise(dim: int, kernel: int, dilation: int = 1) -> SpreadConv2d:
    return SpreadConv2d(dim, dim, kernel, padding=dilation * (kernel // 2), dilation=dilation, groups=dim)


@layers.register("lka")
def _lka(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    # There are no heads: each channel has a kernel of its own. On grids up to 8 x 8 a support of 15 reaches every token.
    small = max(grid) <= 8 and not options.keys() & {"kernel_size", "dilation"}
    return LargeKernelAttention(dim, **({"kernel_size": 14, "dilation": 2} | options if small else options))  # type: ignore[arg-type]
