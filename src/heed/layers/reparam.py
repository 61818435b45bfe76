"""Convolutions that train in several parts with BatchNorm and are fused into one plain convolution afterwards.

    BN(W * x) = s W * x + (b - s mean),   s = gamma / sqrt(var + eps)      per output channel, running statistics
    sum_i (W_i * x + b_i) = (sum_i pad(W_i)) * x + sum_i b_i               odd kernels around the same centre

Convolution is linear in its weights and BatchNorm is affine once it uses running statistics, so both are exact. Ding et
al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, arXiv 2101.03697.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides

M = TypeVar("M", bound=nn.Module)
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS: dict[int, type[Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Fusable(nn.Module):
    """A module that computes, in evaluation, what one convolution does."""

    def fused(self) -> nn.Module:
        """That convolution, with a bias, on the same device and in the same dtype."""
        raise NotImplementedError


@provides("53-metamixer")
def fuse(module: M) -> M | nn.Module:
    """Replace every `Fusable` inside a module by its convolution, in place; the names of the weights change with it.

    Returns:
        The module itself, or, if it is a `Fusable`, the convolution that replaces it.

    Raises:
        RuntimeError: the module is in training mode, where BatchNorm uses the statistics of the batch.
    """
    if module.training:
        raise RuntimeError(
            f"{type(module).__name__} is in training mode, where BatchNorm has no fixed statistics to fuse: "
            "call eval() first"
        )
    if isinstance(module, Fusable):
        return module.fused()
    for name, child in module.named_children():
        setattr(module, name, fuse(child))
    return module


class ConvNorm(Fusable):
    """A convolution without bias, then BatchNorm: (B, in_dim, ...) -> (B, dim, ...).

    Args:
        in_dim: channels of the input.
        dim: channels of the output.
        kernel: side, or sides per axis; odd, the input is padded with kernel // 2 zeros.
        stride: step in pixels.
        groups: of the convolution; in_dim for a depthwise one.
        ndim: axes of the input after its channels: 1 for series (B, C, N), 2 for maps (B, C, H, W), 3 for volumes.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel: int | Sequence[int] = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        sides = (kernel,) * ndim if isinstance(kernel, int) else tuple(kernel)
        for side in sides:
            check_kernel(side)
        padding = tuple(side // 2 for side in sides)
        make = convolution(ndim)
        self.conv = make(in_dim, dim, sides, stride, padding, groups=groups, bias=False)  # type: ignore[arg-type]
        self.norm = _NORMS[ndim](dim)

    def forward(self, x: Float[Tensor, "B C ..."]) -> Float[Tensor, "B D ..."]:
        return self.norm(self.conv(x))

    @torch.no_grad()
    def fused(self) -> Conv:
        scale, shift = norm_as_affine(self.norm)
        weight = self.conv.weight
        return convolution_like(self.conv, weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift)


class BranchedConv(Fusable):
    """The sum of several `ConvNorm` of one input, whose kernels share their centre: (B, C, ...) -> (B, D, ...).

    Args:
        branches: the convolutions by name; the first has the largest kernel, which is the kernel after fusing.
    """

    def __init__(self, **branches: ConvNorm) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)

    def forward(self, x: Float[Tensor, "B C ..."]) -> Float[Tensor, "B D ..."]:
        first, *others = self.branches.values()
        y = first(x)
        for branch in others:
            y = y + branch(x)
        return y

    @torch.no_grad()
    def fused(self) -> Conv:
        first, *others = [branch.fused() for branch in self.branches.values()]  # type: ignore[operator]
        weight, bias = first.weight, first.bias
        for other in others:
            weight = weight + _pad_kernel(other.weight, weight.shape[2:])
            bias = bias + other.bias
        return convolution_like(first, weight, bias)


def convolution(ndim: int) -> type[Conv]:
    """The convolution over so many axes."""
    if ndim not in _CONVOLUTIONS:
        raise ValueError(f"ndim={ndim}: convolutions have 1, 2 or 3 axes")
    return _CONVOLUTIONS[ndim]


def convolution_like(conv: Conv, weight: Tensor, bias: Tensor) -> Conv:
    """A convolution with the stride and groups of `conv`, and these weights (D, C / groups, ...) and biases (D,)."""
    sides = tuple(weight.shape[2:])
    padding = tuple(side // 2 for side in sides)
    made = type(conv)(
        conv.in_channels,
        conv.out_channels,
        sides,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        padding,  # type: ignore[arg-type]
        groups=conv.groups,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)  # type: ignore[union-attr]
    return made.train(conv.training)


def norm_as_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel of a BatchNorm that uses its running statistics."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    return scale, norm.bias - norm.running_mean * scale  # type: ignore[operator]


def check_kernel(side: int) -> int:
    """The side of a kernel, or a ValueError when it has no middle."""
    if side < 1 or side % 2 == 0:
        raise ValueError(f"kernel={side} has no middle; give an odd side, such as {max(side, 0) + 1}")
    return side


def _pad_kernel(weight: Tensor, sides: Sequence[int]) -> Tensor:
    """Zeros around a kernel, the same on both ends of an axis, until it has these sides."""
    padding = []
    for have, want in zip(reversed(weight.shape[2:]), reversed(sides), strict=True):
        padding += [(want - have) // 2] * 2
    return F.pad(weight, padding)
