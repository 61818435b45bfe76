"""FFNet for super-resolution (card 53): convolutional blocks at low resolution add what is missing to enlarged pixels.

    f = conv3(x)                                                          (B, dim, H, W)
    f = f + DW3(GELU(DW3(W f)));   f = f + W_2 GELU(W_1 DW3(f))           depth times
    y = PixelShuffle_s(conv3(f) + x, each channel s^2 times)              (B, 3, sH, sW)

With conv3(f) = 0 this is nearest-neighbour enlargement. The token mixer is FFNified attention with 3 x 3 kernels, without
norms. Training minimises L1 + 0.02 FFT loss, with Adam at 1e-3 (betas 0.9, 0.99), cosine to 1e-5 over 500,000 steps.

Yun, Lee, Ro, "MetaMixer Is All You Need", 2024, arXiv 2406.02021.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.layers.metamixer import FFNifiedAttention, plain_depthwise
from heed.models import HeedModel, register_models
from heed.vision.ffnet import ChannelMixer, FFBlock

_NORMS = ("none", "layer", "batch")


@provides("53-metamixer")
@dataclass(frozen=True)
class FFNetSRConfig:
    """Settings of `FFNetSR`.

    Args:
        scale: how many times longer sides become.
        in_chans: image channels.
        dim: channels of the blocks.
        depth: blocks.
        ratio: hidden width of the channel mixers over the channels.
        norm: "none" as in the published models; "layer": LayerNorm before both mixers; "batch": BatchNorm after the
            query and, which is heed's reading, after the channel mixer's depthwise convolution.
    """

    scale: int = 2
    in_chans: int = 3
    dim: int = 96
    depth: int = 48
    ratio: float = 2.0
    norm: str = "none"

    def __post_init__(self) -> None:
        if self.norm not in _NORMS:
            raise ValueError(unknown("norm", self.norm, _NORMS))
        for name in ("scale", "in_chans", "dim", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


# The authors hold the steps of a mixer in a list, activations among them.
_RENAMES = (
    (r"^module\.", ""),
    (r"\btoken_mixer\.0\.", "token.main.query.0."),
    (r"\btoken_mixer\.1\.", "token.main.interaction.operation."),
    (r"\btoken_mixer\.3\.", "token.main.aggregation.operation."),
    (r"\bchannel_mixer\.0\.", "channel.main.conv.0."),
    (r"\bchannel_mixer\.1\.", "channel.main.fc1."),
    (r"\bchannel_mixer\.3\.", "channel.main.fc2."),
)


@provides("53-metamixer")
class FFNetSR(HeedModel):
    """(B, in_chans, H, W) images to (B, in_chans, scale * H, scale * W); see the module for the equations.

    `from_authors` reads the published models, which are those without norms.
    """

    Config = FFNetSRConfig

    def __init__(self, config: FFNetSRConfig) -> None:
        super().__init__(config)
        c = config
        self.proj = nn.Conv2d(c.in_chans, c.dim, 3, padding=1)
        self.body = nn.Sequential(*(_block(c) for _ in range(c.depth)))
        self.conv_bef_up = nn.Conv2d(c.dim, c.in_chans * c.scale**2, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        c = self.config
        if x.ndim != 4 or x.shape[1] != c.in_chans or 0 in x.shape:
            raise ValueError(f"input {tuple(x.shape)}: this model takes images (B, {c.in_chans}, H, W)")
        detail = self.conv_bef_up(self.body(self.proj(x)))
        return F.pixel_shuffle(detail + x.repeat_interleave(c.scale**2, 1), c.scale)

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        for theirs, ours in _RENAMES:
            key = re.sub(theirs, ours, key)
        return key


def _block(config: FFNetSRConfig) -> FFBlock:
    dim = config.dim
    query, conv = nn.Conv2d(dim, dim, 1), plain_depthwise(dim, 3)
    token = FFNifiedAttention(dim, 3, 3, query=_normed(query, config), depthwise=plain_depthwise)
    return FFBlock(dim, token, ChannelMixer(dim, config.ratio, _normed(conv, config)))


def _normed(conv: nn.Module, config: FFNetSRConfig) -> nn.Sequential:
    """A convolution with the norm that the configuration asks for, before or after it."""
    if config.norm == "layer":
        return nn.Sequential(LayerNorm2d(config.dim), conv)
    return nn.Sequential(conv, nn.BatchNorm2d(config.dim)) if config.norm == "batch" else nn.Sequential(conv)


@provides("53-metamixer")
def fft_loss(
    image: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"], weight: float = 0.02
) -> Float[Tensor, ""]:
    """weight times the mean absolute difference of the real and imaginary parts of both images' 2-D Fourier transforms."""
    ours, theirs = (torch.view_as_real(torch.fft.rfft2(part)) for part in (image, target))
    return weight * F.l1_loss(ours, theirs)


register_models(FFNetSR, ffnet_sr_light=FFNetSRConfig(depth=36), ffnet_sr=FFNetSRConfig())
