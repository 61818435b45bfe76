"""Parts that several backbones are built from. Maps are channels-last (B, H, W, C) unless a name says otherwise.

DropPath, LayerScale, LayerNorm2d, Mlp and initialisers come from timm.layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import trunc_normal_
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, h, w, dim): a strided convolution, then LayerNorm.

    Args:
        in_chans: channels of the input.
        dim: channels of the tokens.
        stride: pixels per token and axis.
        kernel: side of the convolution; default stride, which is patches that do not overlap.
        padding: zeros around the input.
        norm: whether LayerNorm follows.
        fill: zero-pad sides that the stride does not divide at the bottom and right first.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        stride: int,
        kernel: int | None = None,
        padding: int = 0,
        *,
        norm: bool = True,
        fill: bool = True,
    ) -> None:
        super().__init__()
        self.fill = fill
        self.proj = nn.Conv2d(in_chans, dim, kernel or stride, stride, padding)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w dim"]:
        if self.fill:
            x = pad_to_multiple(x, self.proj.stride)  # type: ignore[arg-type]
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvMlp(nn.Module):
    """Linear, depthwise 3x3 convolution, GELU, Linear: (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: channels C.
        hidden: channels in between.
        drop: dropout after the activation and after the output.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)
        nn.init.normal_(self.dwconv.weight, std=(2 / 9) ** 0.5)
        nn.init.zeros_(self.dwconv.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2))
        return self.drop(self.fc2(self.drop(F.gelu(x).permute(0, 2, 3, 1))))


def channels_last(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """The same images with each pixel's channels side by side in memory, on a CPU.

    Convolutions, norms and pooling are faster there in that layout, and hand it on to every map. Compiled and exported
    graphs choose their own.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x
    # A copy even where the strides would do: those of a single channel fit either layout, and the first would be taken.
    return x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def pad_to_multiple(x: Float[Tensor, "B C H W"], size: int | Sequence[int]) -> Float[Tensor, "B C h w"]:
    """Zeros at the bottom and right of a channels-first map until `size` divides its sides."""
    rows, columns = (size, size) if isinstance(size, int) else size
    below, right = -x.shape[2] % rows, -x.shape[3] % columns
    return F.pad(x, (0, right, 0, below)) if below or right else x


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth per stage and block, rising linearly from 0 to `rate` over all blocks."""
    rates = torch.linspace(0, rate, sum(depths), device="cpu").split(list(depths))
    return [part.tolist() for part in rates]


def init_linear(module: nn.Module) -> None:
    """For `model.apply`: linear weights truncated normal with deviation 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def pyramid_info(dims: Sequence[int], first_reduction: int, module: str) -> list[dict[str, object]]:
    """`feature_info` of stages whose sides halve: module names are `module` with the stage's number for {}."""
    return [
        {"num_chs": dim, "reduction": first_reduction * 2**i, "module": module.format(i)} for i, dim in enumerate(dims)
    ]


def check_norm_batch(images: Float[Tensor, "B C H W"], reduction: int) -> None:
    """Raise ValueError for training images that leave BatchNorm one value per channel at a stride of `reduction`."""
    if images.shape[0] == 1 and max(images.shape[2:]) <= reduction:
        raise ValueError(
            f"one image of {images.shape[2]} x {images.shape[3]} pixels leaves one value per channel in the last stage, "
            "and BatchNorm needs more than one to train on: give a larger batch, a side of more than "
            f"{reduction} pixels, or call eval()"
        )
