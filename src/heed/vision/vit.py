"""A plain vision transformer whose attention is any registered layer: the host in which layers are compared.

    x = patches(image) + positions                       (B, rows, columns, C)
    x = x + layer(LN(x));  x = x + MLP(LN(x))            depth times
    logits = head(mean(LN(x)))

There is no class token, so that every mechanism that works on a grid of tokens drops in (Dosovitskiy et al., ICLR 2021,
with global average pooling).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn

from heed.layers.registry import create_layer
from heed.models import register_models
from heed.vision.backbone import Backbone
from heed.vision.parts import drop_path_rates


@dataclass(frozen=True)
class ViTConfig:
    """Settings of `ViT`.

    Args:
        img_size: side of the square input image in pixels; a multiple of patch_size.
        patch_size: side of a patch in pixels.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dim: channels.
        depth: blocks.
        num_heads: heads per block.
        mlp_ratio: hidden width of the MLP over dim.
        attention: name of a registered layer.
        attention_options: its settings; what is left out is chosen to fit the grid.
        drop_path: stochastic depth of the last block, linear from 0.
    """

    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    attention: str = "softmax"
    attention_options: dict[str, Any] = field(default_factory=dict)
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size={self.img_size} is not a multiple of patch_size={self.patch_size}")


class Block(nn.Module):
    """Pre-norm transformer block on a grid of tokens, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, config: ViTConfig, grid: tuple[int, int], drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = create_layer(config.attention, config.dim, config.num_heads, grid, **config.attention_options)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = Mlp(config.dim, int(config.dim * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(Backbone):
    """(B, in_chans, img_size, img_size) images to (B, num_classes) logits; see the module for the equations."""

    Config = ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        side = config.img_size // config.patch_size
        self.num_classes = config.num_classes
        self.num_features = config.dim
        self.feature_info = [
            {"num_chs": config.dim, "reduction": config.patch_size, "module": f"blocks.{i}"}
            for i in range(config.depth)
        ]
        self.patch_embed = nn.Conv2d(config.in_chans, config.dim, config.patch_size, config.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, side, side, config.dim))
        (rates,) = drop_path_rates(config.drop_path, [config.depth])
        self.blocks = nn.ModuleList(Block(config, (side, side), rate) for rate in rates)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = self.classifier(config.num_classes)
        trunc_normal_(self.pos_embed, std=0.02)

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        tokens = self.patch_embed(x).permute(0, 2, 3, 1) + self.pos_embed
        maps = []
        for block in self.blocks:
            tokens = block(tokens)
            maps.append(tokens.permute(0, 3, 1, 2))
        return maps

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


register_models(
    ViT,
    # For images of 8 to 32 pixels a side. A patch of one grey pixel is no token: the first LayerNorm would hide how bright
    # it is.
    vit_micro=ViTConfig(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, dim=64, depth=4, num_heads=4, mlp_ratio=2.0
    ),
    vit_tiny=ViTConfig(),
    vit_small=ViTConfig(dim=384, num_heads=6),
    vit_base=ViTConfig(dim=768, num_heads=12),
)
