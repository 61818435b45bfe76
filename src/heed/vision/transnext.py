"""TransNeXt with mixture-of-head attention (card 27, MoH-ViT): a pyramid that looks near and, pooled, everywhere.

    x = LN(conv(x))                                  (B, H/4, W/4, C) first, then sides halved; kernels overlap
    x = x + Attention(LN(x))                         aggregated attention; where nothing is pooled, all tokens to all
    x = x + ConvGLU(LN(x))                           ConvGLU(x) = W_2 (GELU(DWConv3x3(a)) * v),  [a, v] = x W_1
    x = LN(x)                                        the stage's map, and what the next stage starts from
    logits = head(mean of the last map)

In MoH-ViT every attention sums its heads with weights per token, and a token uses some heads always and others only where
a router chooses them (`heed.layers.moh`). Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", CVPR
2024, arXiv 2311.17132; Jin, Zhu, Yuan, Yan, "MoH: Multi-Head Attention as Mixture-of-Head Attention", ICML 2025, arXiv
2410.11842. Training adds the load-balance loss: see `heed.layers.moh.collect_balance`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.aggregated import AggregatedAttention, CosineHeads, LengthScaledAttention
from heed.layers.moh import authors_router_key
from heed.models import register_models
from heed.vision.backbone import Backbone
from heed.vision.parts import PatchEmbed, drop_path_rates, init_linear, pyramid_info


@provides("27-moh")
@dataclass(frozen=True)
class TransNeXtConfig:
    """Settings of `TransNeXt`; settings per stage have one entry per stage. The defaults are MoH-ViT-S-80.

    Args:
        img_size: side of the square images in pixels; position tables are made for it.
        patch_size: pixels per position of the first map and axis; its convolution has kernel 2 * patch_size - 1.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dims: channels per stage.
        num_heads: heads per stage.
        mlp_ratios: ConvGLU's width over the channels per stage, before the two thirds that gating leaves of it.
        depths: blocks per stage.
        pool_ratios: tokens per pooled token and axis, per stage; 1 for attention of all tokens to all without a window.
        window_sizes: side of the window per stage, odd; not used where the pooling ratio is 1.
        shared_heads: heads per stage that every token uses; None for TransNeXt without gates.
        routed_heads: heads per stage that are chosen for every token, of those that are not shared.
        qkv_bias: whether the query, key and value projections have biases.
        pretrain_size: side in pixels that offsets are measured by, default img_size; to fine-tune at another img_size, keep
            the one of the weights.
        drop_path: stochastic depth of the last block, linear from 0. The authors have 0.45 for S and 0.6 for B.
    """

    img_size: int = 224
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000
    dims: tuple[int, ...] = (72, 144, 288, 576)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    depths: tuple[int, ...] = (5, 5, 22, 5)
    pool_ratios: tuple[int, ...] = (8, 4, 2, 1)
    window_sizes: tuple[int | None, ...] = (3, 3, 3, None)
    shared_heads: tuple[int, ...] | None = (3, 6, 3, 8)
    routed_heads: tuple[int, ...] = (0, 0, 6, 12)
    qkv_bias: bool = True
    pretrain_size: int | None = None
    drop_path: float = 0.45

    def __post_init__(self) -> None:
        stages = len(self.dims)
        for name in (
            "num_heads", "mlp_ratios", "depths", "pool_ratios", "window_sizes", "shared_heads", "routed_heads"
        ):  # fmt: skip
            values = getattr(self, name)
            if values is not None and len(values) != stages:
                raise ValueError(
                    f"{name}={values} has {len(values)} entries for the {stages} stages of dims={self.dims}"
                )
        for ratio, window in zip(self.pool_ratios, self.window_sizes, strict=True):
            if ratio != 1 and window is None:
                raise ValueError(
                    f"window_sizes={self.window_sizes}: stages with pool_ratios={self.pool_ratios} above 1 need a window"
                )
        for name in ("img_size", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 pixel")

    def grids(self, img_size: int) -> list[tuple[int, int]]:
        """Rows and columns of the tokens per stage, for images of that side."""
        sides = [-(-img_size // (self.patch_size * 2**stage)) for stage in range(len(self.dims))]
        return [(side, side) for side in sides]


class ConvGLU(nn.Module):
    """Values gated by a convolution of their neighbours: (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: channels C.
        hidden: width of an ungated MLP of about as many parameters; two thirds of it are the width here.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        width = int(2 * hidden / 3)
        self.fc1 = nn.Linear(dim, 2 * width)
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        gate, value = self.fc1(x).chunk(2, -1)
        return self.fc2(F.gelu(self.dwconv(gate.permute(0, 3, 1, 2))).permute(0, 2, 3, 1) * value)


@provides("27-moh")
class TransNeXtBlock(nn.Module):
    """Attention and ConvGLU, each after a LayerNorm and added: (B, H, W, C) -> (B, H, W, C).

    Args:
        attention: an `AggregatedAttention` or a `LengthScaledAttention`.
        mlp_ratio: ConvGLU's width over the channels, before the two thirds.
        drop_path: probability of skipping either part while training, per image.
    """

    def __init__(self, attention: CosineHeads, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        dim = attention.dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvGLU(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Overlapping patch embedding, the blocks, LayerNorm: (B, H, W, C) -> (B, ceil(H/s), ceil(W/s), D)."""

    def __init__(self, in_dim: int, dim: int, stride: int, blocks: list[TransNeXtBlock]) -> None:
        super().__init__()
        self.embed = PatchEmbed(in_dim, dim, stride, 2 * stride - 1, stride - 1, fill=False)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w D"]:
        return self.norm(self.blocks(self.embed(x.permute(0, 3, 1, 2))))


# The authors number stages from 1 and hold a stage's parts side by side: patch_embed1, block1, norm1, patch_embed2, ...
_RENAMES = (
    (r"^patch_embed(\d)\.", r"stages.\1.embed."),
    (r"^block(\d)\.", r"stages.\1.blocks."),
    (r"^norm(\d)\.", r"stages.\1.norm."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
)
# Tables that follow from the sizes, which some checkpoints hold.
_TABLES = re.compile(r"(^relative_(pos_index|coords_table)\d|\.(seq_length_scale|padding_mask))$")


@provides("27-moh")
class TransNeXt(Backbone):
    """(B, in_chans, img_size, img_size) images to (B, num_classes) logits; see the module for the equations.

    The position tables belong to img_size, so other sizes are refused; weights fit a model of any img_size. Training with
    routed heads adds 0.01 times `heed.layers.moh.collect_balance`'s loss. `heed.layers.moh.active_heads` counts the heads.
    """

    Config = TransNeXtConfig

    def __init__(self, config: TransNeXtConfig) -> None:
        super().__init__(config)
        c = config
        self.num_classes = c.num_classes
        self.num_features = c.dims[-1]
        self.feature_info = pyramid_info(c.dims, c.patch_size, "stages.{}")
        stages, width = [], c.in_chans
        for i, rates in enumerate(drop_path_rates(c.drop_path, c.depths)):
            blocks = [TransNeXtBlock(_attention(c, i), c.mlp_ratios[i], rate) for rate in rates]
            stages.append(Stage(width, c.dims[i], 2 if i else c.patch_size, blocks))
            width = c.dims[i]
        self.stages = nn.ModuleList(stages)
        self.head = self.classifier(c.num_classes)
        self.apply(init_linear)
        self.apply(_init_conv)

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        tokens = x.permute(0, 2, 3, 1)
        maps = []
        for stage in self.stages:
            tokens = stage(tokens)
            maps.append(tokens.permute(0, 3, 1, 2))
        return maps

    def idle_parameters(self) -> set[str]:
        """Where one head is routed its gate is constant, and only the load-balance loss gives wg a gradient."""
        return {
            f"{name}.router.wg.weight"
            for name, layer in self.named_modules()
            if isinstance(layer, CosineHeads) and layer.router is not None and layer.router.routed == 1
        }

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        if _TABLES.search(key):
            return None
        for theirs, ours in _RENAMES:
            key = re.sub(theirs, ours, key)
        return authors_router_key(re.sub(r"^stages\.(\d)", lambda found: f"stages.{int(found[1]) - 1}", key))


def _attention(config: TransNeXtConfig, stage: int) -> CosineHeads:
    c = config
    sizes = (c.dims[stage], c.num_heads[stage], c.grids(c.img_size)[stage])
    shared = None if c.shared_heads is None else c.shared_heads[stage]
    routed = 0 if c.shared_heads is None else c.routed_heads[stage]
    pretrain = c.grids(c.pretrain_size or c.img_size)[stage]
    window, ratio = c.window_sizes[stage], c.pool_ratios[stage]
    if ratio == 1 or window is None:
        return LengthScaledAttention(*sizes, qkv_bias=c.qkv_bias, shared=shared, routed=routed, pretrain_grid=pretrain)
    return AggregatedAttention(
        *sizes, window_size=window, pool_ratio=ratio, qkv_bias=c.qkv_bias,
        shared=shared, routed=routed, pretrain_grid=pretrain,
    )  # fmt: skip


def _init_conv(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_SMALL = TransNeXtConfig()
_BASE = TransNeXtConfig(
    dims=(96, 192, 384, 768),
    num_heads=(4, 8, 16, 32),
    depths=(5, 5, 23, 5),
    shared_heads=(4, 8, 4, 5),
    routed_heads=(0, 0, 8, 16),
    drop_path=0.6,
)
# For images of 8 to 32 pixels: the size of `vit_micro`, two stages, heads that are all used and weighed.
_MICRO = TransNeXtConfig(
    img_size=8,
    patch_size=1,
    in_chans=1,
    num_classes=10,
    dims=(32, 64),
    num_heads=(4, 4),
    mlp_ratios=(2, 2),
    depths=(2, 2),
    pool_ratios=(2, 1),
    window_sizes=(3, None),
    shared_heads=(4, 4),
    routed_heads=(0, 0),
    drop_path=0.0,
)

register_models(
    TransNeXt,
    transnext_micro=_MICRO,
    moh_vit_micro=replace(_MICRO, shared_heads=(1, 1), routed_heads=(2, 2)),
    moh_vit_s80=_SMALL,
    moh_vit_s75=replace(_SMALL, shared_heads=(3, 6, 3, 4)),
    moh_vit_b75=_BASE,
    moh_vit_b50=replace(_BASE, shared_heads=(2, 2, 2, 4), routed_heads=(2, 4, 6, 8)),
)
