"""Isotropic NAT and DiNAT, and the ViT they are compared with (card 58): one level of 16x16 patches, no class token.

    x = LN(conv16x16/16(image))                                      (B, H/16, W/16, C)
    x = x + attention(LN(x));  x = x + MLP(LN(x))                    depth times
    logits = head(mean(LN(x)))

    isotropic NAT, DiNAT:  neighborhood attention, in DiNAT dilated in every second layer
    ViT with RPB:          softmax(q k^T / sqrt(c) + rpb[key - query]) v over all tokens, rpb (heads, 2L - 1, 2L - 1) for
                           L x L tokens

Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv 2209.15001. The layer is in `heed.vision.nat`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import trunc_normal_
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.bias import Bias, RelativeBias
from heed.layers.attention import PatternAttention
from heed.layers.neighborhood import NeighborhoodAttention2D
from heed.models import register_models
from heed.vision.nat import NATLayer, NeighborhoodBackbone
from heed.vision.parts import PatchEmbed, drop_path_rates, init_linear


@provides("58-dinat")
@dataclass(frozen=True)
class ViTRPBConfig:
    """Settings of `ViTRPB`; the defaults are its small size.

    Args:
        img_size: side of the images in pixels; a multiple of patch_size.
        patch_size: side of a patch in pixels.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dim: channels.
        depth: layers.
        num_heads: heads.
        mlp_ratio: hidden width of the MLP over dim.
        qkv_bias: whether the query, key and value projections have biases.
        layer_scale: initial factor on the channels of each branch; None for no such factors.
        drop: dropout after the patches, the attention and inside the MLP.
        attn_drop: dropout on the attention weights.
        drop_path: stochastic depth of the last layer, linear from 0.
    """

    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    dim: int = 384
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    layer_scale: float | None = None
    drop: float = 0.0
    attn_drop: float = 0.0
    drop_path: float = 0.1


@provides("58-dinat")
@dataclass(frozen=True)
class NATIsotropicConfig(ViTRPBConfig):
    """Settings of `NATIsotropic`: those of `ViTRPBConfig`, though images may have any size, and the windows.

    Args:
        kernel_size: side of the windows in tokens; odd.
        dilation: of the layers 1, 3, 5, ... counted from 0; the others have 1.
    """

    kernel_size: int = 7
    dilation: int = 1


class _Isotropic(NeighborhoodBackbone):
    """Everything but the attention. `forward_intermediates` gives the map of every layer."""

    def __init__(self, config: ViTRPBConfig) -> None:
        super().__init__(config)
        self.num_classes = config.num_classes
        self.num_features = config.dim
        self.feature_info = [
            {"num_chs": config.dim, "reduction": config.patch_size, "module": f"layers.{i}"}
            for i in range(config.depth)
        ]
        self.patch_embed = PatchEmbed(config.in_chans, config.dim, config.patch_size)
        self.pos_drop = nn.Dropout(config.drop)
        (rates,) = drop_path_rates(config.drop_path, [config.depth])
        self.layers = nn.ModuleList(
            NATLayer(
                self.attention(config, i),
                config.mlp_ratio,
                layer_scale=config.layer_scale,
                drop=config.drop,
                drop_path=rate,
            )
            for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.head = self.classifier(config.num_classes)
        self.apply(init_linear)

    @staticmethod
    def attention(config: ViTRPBConfig, layer: int) -> PatternAttention:
        """The attention of a layer."""
        raise NotImplementedError

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        x = self.pos_drop(self.patch_embed(x))
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def finish(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def flops(self, height: int | None = None, width: int | None = None) -> int:
        """Multiply-adds for one image of height x width pixels (default img_size)."""
        c = self.config
        rows, columns = (-(-(c.img_size if side is None else side) // c.patch_size) for side in (height, width))
        patches = rows * columns * self.patch_embed.proj.weight.numel()
        return patches + sum(x.flops(rows, columns) for x in self.layers) + c.dim * c.num_classes  # type: ignore[operator]

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        # Their ViT stores the places of its table; the engine computes them.
        return None if key.endswith(".attn.relative_position_index") else key


@provides("58-dinat")
class NATIsotropic(_Isotropic):
    """(B, in_chans, H, W) images of any size to (B, num_classes) logits, by neighborhood attention on one level.

    Sides that the patches do not divide are zero-padded at the bottom and right (heed's choice; the authors fix 224).
    """

    Config = NATIsotropicConfig

    @staticmethod
    def attention(config: NATIsotropicConfig, layer: int) -> PatternAttention:  # type: ignore[override]
        return NeighborhoodAttention2D(
            config.dim,
            config.num_heads,
            config.kernel_size,
            dilation=config.dilation if layer % 2 else 1,
            rel_pos_bias=True,
            pad=True,
            qkv_bias=config.qkv_bias,
            attn_drop=config.attn_drop,
            proj_drop=config.drop,
        )


@provides("58-dinat")
class RPBAttention(PatternAttention):
    """Attention of every token to every token of a fixed grid, with a table over relative positions: (B, L, L, C) to itself.

    Args:
        dim, num_heads, options: as in `PatternAttention`.
        side: L.
    """

    def __init__(self, dim: int, num_heads: int, side: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * side - 1, 2 * side - 1))
        trunc_normal_(self.rpb, std=0.02)

    def bias(self) -> Bias:
        return RelativeBias(self.rpb)


@provides("58-dinat")
class ViTRPB(_Isotropic):
    """(B, in_chans, img_size, img_size) images to (B, num_classes) logits, by global attention with relative positions."""

    Config = ViTRPBConfig
    takes_any_size = False

    def __init__(self, config: ViTRPBConfig) -> None:
        if config.img_size % config.patch_size:
            raise ValueError(f"img_size={config.img_size} is not a multiple of patch_size={config.patch_size}")
        super().__init__(config)

    @staticmethod
    def attention(config: ViTRPBConfig, layer: int) -> PatternAttention:
        return RPBAttention(
            config.dim,
            config.num_heads,
            config.img_size // config.patch_size,
            qkv_bias=config.qkv_bias,
            attn_drop=config.attn_drop,
            proj_drop=config.drop,
        )


_SMALL = NATIsotropicConfig()
_BASE = replace(_SMALL, dim=768, num_heads=24, drop_path=0.4)
# For images of 8 to 32 pixels a side: the size of `vit_micro`.
_MICRO = NATIsotropicConfig(
    img_size=8,
    patch_size=2,
    in_chans=1,
    num_classes=10,
    dim=64,
    depth=4,
    num_heads=8,
    mlp_ratio=2.0,
    drop_path=0.0,
    kernel_size=3,
)

register_models(
    NATIsotropic,
    dinat_isotropic_micro=replace(_MICRO, dilation=2),
    nat_isotropic_micro=_MICRO,
    nat_isotropic_small=_SMALL,
    nat_isotropic_base=_BASE,
    dinat_isotropic_small=replace(_SMALL, dilation=2),
    dinat_isotropic_base=replace(_BASE, dilation=2),
)
register_models(
    ViTRPB,
    # Larger patches than above: relative positions alone teach it slowly what lies where.
    vitrpb_micro=ViTRPBConfig(
        img_size=8,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=2.0,
        drop_path=0.0,
    ),
    vitrpb_small=ViTRPBConfig(),
    vitrpb_base=ViTRPBConfig(dim=768, num_heads=24, drop_path=0.4),
)
