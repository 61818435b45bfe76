"""Networks with polarized self-attention (card 35) that regress a value per pixel: key-point heat maps, segmentation.

    maps = timm network, PSA after the first 3x3 convolution of its residual blocks      (B, C_i, H / r_i, W / r_i)
    y = W maps_0                       "first": the finest map, as in key-point networks (B, outputs, H / 4, W / 4)
    y = W [maps_0, up(maps_1), ...]    "all": coarser maps enlarged to the finest one, as in segmentation

W is a 1x1 convolution. Liu, Liu, Fan, Huang, "Polarized Self-Attention: Towards High-quality Pixel-wise Regression",
Neurocomputing 2022 (arXiv 2107.00782). Only the segmentation code was released, with a larger head; the pose network, these
heads and `gaussian_heatmaps` follow the text and common practice, and are heed's own reading.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.layers.psa import insert_psa
from heed.models import HeedModel, register_models
from heed.vision.parts import channels_last


@provides("35-psa")
@dataclass(frozen=True)
class PSANetConfig:
    """Settings of `PSANet`; the defaults are HRNet-W48 for the 17 key points of COCO.

    Args:
        host: a timm HRNet or ResNet.
        outputs: maps to regress: key points, or classes.
        fuse: "first" reads the finest map, "all" every map.
        layout: PSA's layout, "sequential" or "parallel"; "" for the host without PSA.
        variant: "code" or "paper", see `heed.layers.psa.PSA`.
        gain: factor on PSA's output.
        every_block: PSA in bottleneck blocks, too; the authors' HRNet has it in its basic blocks alone.
        in_chans: image channels.
    """

    host: str = "hrnet_w48"
    outputs: int = 17
    fuse: str = "first"
    layout: str = "sequential"
    variant: str = "code"
    gain: float = 1.0
    every_block: bool = False
    in_chans: int = 3

    def __post_init__(self) -> None:
        if self.fuse not in ("first", "all"):
            raise ValueError(unknown("way to fuse", self.fuse, ("first", "all")))
        if self.outputs < 1:
            raise ValueError(f"outputs={self.outputs} must be at least 1")
        if not self.host.startswith(("hrnet", "resnet")) or not timm.is_model(self.host):
            raise ValueError(unknown("HRNet or ResNet of timm", self.host, timm.list_models(["hrnet*", "resnet*"])))


@provides("35-psa")
class PSANet(HeedModel):
    """(B, in_chans, H, W) images to (B, outputs, H / 4, W / 4) maps without activation; see the module.

    `insertion` says which blocks have a PSA and what it costs. Sides of images should be multiples of 32. With fuse="first"
    what only serves the coarser maps is idle: it gets no gradient.
    """

    Config = PSANetConfig

    def __init__(self, config: PSANetConfig) -> None:
        super().__init__(config)
        # The four maps of the backbone; timm numbers the stem 0. An HRNet gives its branches as they are.
        options: dict[str, Any] = {"feature_location": ""} if config.host.startswith("hrnet") else {}
        self.host: Any = timm.create_model(
            config.host, in_chans=config.in_chans, features_only=True, out_indices=(1, 2, 3, 4), **options
        )
        widths = self.host.feature_info.channels()
        self.insertion = None
        if config.layout:
            blocks = (BasicBlock, Bottleneck) if config.every_block else (BasicBlock,)
            self.insertion = insert_psa(
                self.host, blocks, layout=config.layout, variant=config.variant, gain=config.gain
            )
        self.head = nn.Conv2d(widths[0] if config.fuse == "first" else sum(widths), config.outputs, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K h w"]:
        if x.ndim != 4 or x.shape[1] != self.config.in_chans:
            raise ValueError(f"input {tuple(x.shape)}: this model takes images (B, {self.config.in_chans}, H, W)")
        maps = self.host(channels_last(x))
        if self.config.fuse == "first":
            return self.head(maps[0])
        # The head of the maps, enlarged and joined; the two commute, and the head makes few channels of many.
        first, *others = self.head.weight.split([m.shape[1] for m in maps], 1)
        out = F.conv2d(maps[0], first, self.head.bias)
        for m, weight in zip(maps[1:], others, strict=True):
            out = out + F.interpolate(F.conv2d(m, weight), out.shape[2:], mode="bilinear")
        return out


@provides("35-psa")
def gaussian_heatmaps(
    points: Float[Tensor, "B K 2"], size: tuple[int, int], sigma: float = 2.0
) -> Float[Tensor, "B K h w"]:
    """Regression targets exp(-|position - point|^2 / (2 sigma^2)), peak 1.

    Args:
        points: (B, K, 2) key points as (row, column) in pixels of the map; points outside give the tail that reaches in.
        size: height and width of the map.
        sigma: standard deviation in pixels of the map, > 0.

    Raises:
        ValueError: points of another shape, or sigma <= 0.
    """
    if points.ndim != 3 or points.shape[-1] != 2:
        raise ValueError(f"points must be (B, K, 2), row and column; got {tuple(points.shape)}")
    if sigma <= 0:
        raise ValueError(f"sigma={sigma} must be positive")
    rows, columns = (
        torch.exp(-(torch.arange(n, device=points.device) - points[..., axis, None]).square() / (2 * sigma**2))
        for axis, n in enumerate(size)
    )
    return rows[..., :, None] * columns[..., None, :]


@provides("35-psa")
def peaks(heatmaps: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K 2"]:
    """Where each heat map is highest, (row, column) in its pixels."""
    best = heatmaps.flatten(2).argmax(-1)
    width = heatmaps.shape[-1]
    return torch.stack([best // width, best % width], -1).to(heatmaps.dtype)


_POSE = PSANetConfig()
register_models(
    PSANet,
    psa_hrnet_w18_small=replace(_POSE, host="hrnet_w18_small"),
    psa_hrnet_w48=_POSE,
    psa_hrnet_w48_seg=replace(_POSE, outputs=19, fuse="all"),  # the classes of Cityscapes
    psa_resnet18=replace(_POSE, host="resnet18", fuse="all"),
    psa_resnet50=replace(_POSE, host="resnet50", fuse="all", every_block=True),
    psa_resnet101=replace(_POSE, host="resnet101", fuse="all", every_block=True),
)
