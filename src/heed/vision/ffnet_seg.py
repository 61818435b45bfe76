"""FFNet for segmentation (card 53): a backbone of four-branch depthwise kernels and the head that joins its last maps.

    DW(x) = sum of k x k, (k-4) x (k-4), 1 x k, k x 1, each with BatchNorm       fused: one k x k; k = 3 lacks the second
    z = [up_1(map_2), up_2(map_3), up_4(map_4)]                                  (B, 192 + 384 + 768, H/8, W/8)
    z = ConvBN(GELU(ConvBN(z)))                                                  256 channels
    z = GELU(z + mixer(z))                                                       token and channel mixer, three times
    logits = W GELU(ConvBN(z))                                                   (B, labels, H/8, W/8)

Yun, Lee, Ro, "MetaMixer Is All You Need", 2024, arXiv 2406.02021. The authors publish 50.1 mIoU on ADE20K (single scale)
and 83.2 on Cityscapes. Blocks are theirs to the number. That the two first stages have kernels of 3, that the channel
mixers' kernels are those of the token mixers, and that residuals have no layer scale is heed's own reading; fused, it
has the 74 G multiply-adds at 512 x 512 that they give.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.layers.metamixer import FFNifiedAttention
from heed.layers.reparam import BranchedConv, ConvNorm, fuse
from heed.models import HeedModel, register_models
from heed.vision.ffnet import BLOCK_RENAMES, NORM_RENAMES, ChannelMixer, FFBlock, check_stages, init_weights
from heed.vision.parts import channels_last, drop_path_rates

_STEM = 64
_UPSAMPLING = ("bicubic", "bilinear", "nearest")


@provides("53-metamixer")
@dataclass(frozen=True)
class FFNetSegConfig:
    """Settings of `FFNetSeg`; tuples have one entry per stage.

    Args:
        in_chans: image channels.
        num_labels: classes a pixel can have.
        dims: channels, at strides 4, 8, 16, 32.
        depths: blocks.
        kernels: sides of all depthwise kernels of a stage: 3, or odd and at least 7.
        ratio: hidden width of the channel mixers over the channels.
        layer_scale: initial factor on the backbone's residuals, None for none.
        drop_path: stochastic depth of the backbone's last block, linear from 0.
        head_dim: channels of the head's blocks.
        head_depth: blocks in the head.
        head_kernel: side of their depthwise kernels.
        last_dim: channels before the classifier.
        drop: dropout before the classifier.
        upsampling: how maps are enlarged: "bicubic", "bilinear" or "nearest".
        fused: built as what `FFNetSeg.fuse` leaves.
    """

    in_chans: int = 3
    num_labels: int = 150
    dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 4, 18, 5)
    kernels: tuple[int, ...] = (3, 3, 9, 9)
    ratio: float = 4.0
    layer_scale: float | None = None
    drop_path: float = 0.0
    head_dim: int = 256
    head_depth: int = 3
    head_kernel: int = 9
    last_dim: int = 1024
    drop: float = 0.1
    upsampling: str = "bicubic"
    fused: bool = False

    def __post_init__(self) -> None:
        check_stages(self, ("depths", "kernels"))
        if len(self.dims) < 2:
            raise ValueError(f"dims={self.dims}: the head joins the maps from the second stage on; give two or more")
        if self.upsampling not in _UPSAMPLING:
            raise ValueError(unknown("upsampling", self.upsampling, _UPSAMPLING))


@provides("53-metamixer")
def crossed_depthwise(dim: int, kernel: int, ndim: int = 2) -> BranchedConv:
    """Depthwise convolutions with BatchNorm of k x k, (k-4) x (k-4), 1 x k and k x 1, to be fused into one.

    Args:
        dim: channels.
        kernel: k, odd; 3 has no second branch.
        ndim: 2.
    """
    if ndim != 2 or kernel % 2 == 0 or (kernel != 3 and kernel < 7):
        raise ValueError(f"kernel={kernel}, ndim={ndim}: branches for maps need a kernel of 3, or odd and at least 7")
    small = {"small": ConvNorm(dim, dim, kernel - 4, groups=dim)} if kernel > 3 else {}
    return BranchedConv(
        large=ConvNorm(dim, dim, kernel, groups=dim),
        **small,
        row=ConvNorm(dim, dim, (1, kernel), groups=dim),
        column=ConvNorm(dim, dim, (kernel, 1), groups=dim),
    )


@provides("53-metamixer")
def seg_block(
    dim: int,
    kernel: int,
    ratio: float = 4.0,
    *,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
    activate: bool = False,
) -> FFBlock:
    """An `FFBlock` with `crossed_depthwise` kernels; with `activate`, GELU after both residuals, as in the head."""
    return FFBlock(
        dim,
        FFNifiedAttention(dim, kernel, kernel, depthwise=crossed_depthwise),
        ChannelMixer(dim, ratio, crossed_depthwise(dim, kernel)),
        layer_scale=layer_scale,
        drop_path=drop_path,
        activate=activate,
    )


class FFNetSegBackbone(nn.Module):
    """(B, in_chans, H, W) images to the maps of the stages from the second on, at strides 8, 16, 32."""

    def __init__(self, config: FFNetSegConfig) -> None:
        super().__init__()
        c = config
        self.stem = nn.Sequential(
            ConvNorm(c.in_chans, _STEM, 3, 2),
            nn.GELU(),
            ConvNorm(_STEM, _STEM, 3),
            nn.GELU(),
            ConvNorm(_STEM, c.dims[0], 3),
            ConvNorm(c.dims[0], c.dims[0], 3, 2),
        )
        rates = drop_path_rates(c.drop_path, c.depths)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(c.dims):
            merging = [
                nn.Sequential(ConvNorm(c.dims[i - 1], 2 * dim, 3, 2), nn.GELU(), ConvNorm(2 * dim, dim))
            ] if i else []  # fmt: skip
            blocks = (
                seg_block(dim, c.kernels[i], c.ratio, layer_scale=c.layer_scale, drop_path=rate) for rate in rates[i]
            )
            self.stages.append(nn.Sequential(*merging, *blocks))

    def forward(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        x = self.stem(channels_last(x))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


class FFNetHead(nn.Module):
    """The maps of `FFNetSegBackbone` to logits (B, num_labels, h, w) at the resolution of the first map."""

    def __init__(self, config: FFNetSegConfig) -> None:
        super().__init__()
        c = config
        joined = sum(c.dims[1:])
        self.mode = c.upsampling
        self.squeeze = nn.Sequential(ConvNorm(joined, joined), nn.GELU(), ConvNorm(joined, c.head_dim))
        self.blocks = nn.Sequential(
            *(seg_block(c.head_dim, c.head_kernel, c.ratio, activate=True) for _ in range(c.head_depth))
        )
        self.align = nn.Sequential(ConvNorm(c.head_dim, c.last_dim), nn.GELU())
        self.drop = nn.Dropout2d(c.drop)
        self.classify = nn.Conv2d(c.last_dim, c.num_labels, 1)

    def forward(self, maps: list[Tensor]) -> Float[Tensor, "B K h w"]:
        size = maps[0].shape[2:]
        options = {} if self.mode == "nearest" else {"align_corners": False}
        enlarged = [F.interpolate(x, size, mode=self.mode, **options) for x in maps[1:]]
        x = self.blocks(self.squeeze(torch.cat([maps[0], *enlarged], 1)))
        return self.classify(self.drop(self.align(x)))


# The authors' names of a block, and ours.
_RENAMES = (
    *BLOCK_RENAMES,
    (r"\.conv1\.(?=(c|bn)\.)", ".branches.large."),
    (r"\.conv2\.(?=(c|bn)\.)", ".branches.small."),
    (r"\.strip_conv1\.", ".branches.row."),
    (r"\.strip_conv2\.", ".branches.column."),
    *NORM_RENAMES,
)


@provides("53-metamixer")
def seg_block_key(key: str) -> str:
    """heed's name for a weight of a block of the authors' segmentation code."""
    for theirs, ours in _RENAMES:
        key = re.sub(theirs, ours, key)
    return key


@provides("53-metamixer")
class FFNetSeg(HeedModel):
    """(B, in_chans, H, W) images to logits per pixel (B, num_labels, H/8, W/8); see the module for the equations.

    Enlarge the logits to the image for predictions. `backbone` alone gives the maps at strides 8, 16 and 32.
    """

    Config = FFNetSegConfig

    def __init__(self, config: FFNetSegConfig) -> None:
        super().__init__(config)
        self.backbone = FFNetSegBackbone(config)
        self.decode_head = FFNetHead(config)
        self.apply(init_weights)
        if config.fused:
            fuse(self.eval()).train()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K h w"]:
        if x.ndim != 4 or x.shape[1] != self.config.in_chans or 0 in x.shape:
            raise ValueError(f"input {tuple(x.shape)}: this model takes images (B, {self.config.in_chans}, H, W)")
        return self.decode_head(self.backbone(x))

    def fuse(self) -> Self:
        """Fold BatchNorms and branches into the convolutions, in place; RuntimeError in training mode."""
        fuse(self)
        self.config = dataclasses.replace(self.config, fused=True)
        return self


register_models(FFNetSeg, ffnet_seg=FFNetSegConfig())
