"""DaViT (card 24): a four-stage backbone that alternates attention between tokens of a window and between channels.

    x = LN(conv7x7/4(image))                                           (B, H/4, W/4, C)
    dual block:  spatial block, then channel block; each of them
                 x = x + dwconv3x3(x);  x = x + attention(LN(x))       window or channel attention
                 x = x + dwconv3x3(x);  x = x + MLP(LN(x))
    between:     x = conv2x2/2(LN(x))                                  sides halved, channels widened
    logits = head(LN(mean(x)))                                         the mean comes first

Windows see what is near, channels what is everywhere, both at a cost linear in the tokens; the depthwise convolutions say
where tokens are. Ding, Xiao, Codella, Luo, Wang, Yuan, "DaViT: Dual Attention Vision Transformers", ECCV 2022 (arXiv
2204.03645). Parameter names are the authors'. With v2 channel attention and overlapping embeddings it is the vision tower
of Florence-2 (Xiao et al., CVPR 2024).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Self

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import load_weights
from heed.errors import unknown
from heed.layers.channel import ChannelGroupAttention
from heed.layers.window import WindowAttention
from heed.models import register_models
from heed.vision.backbone import Backbone
from heed.vision.parts import PatchEmbed, drop_path_rates, init_linear, pad_to_multiple, pyramid_info

_KINDS = ("spatial", "channel")
_NORMS = ("head", "stages", "none")


@provides("24-davit")
@dataclass(frozen=True)
class DaViTConfig:
    """Settings of `DaViT`; the defaults are DaViT-Tiny.

    Args:
        img_size: side in pixels that `multiply_adds` counts for; the model takes images of any size.
        patch_size: side of a patch in pixels: 4 as published; 2 and 1, with kernels of 3x3 and 1x1 in place of 7x7, are
            heed's addition for small images.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dims: channels per stage.
        depths: dual blocks per stage.
        num_heads: heads, and groups of channels, per stage.
        window_size: side of a window in tokens.
        mlp_ratio: hidden width of the MLP over the stage's channels.
        qkv_bias: whether the query, key and value projections have biases.
        blocks: what a dual block is made of, in order: "spatial", "channel" or both.
        ffn: whether blocks have an MLP.
        overlapped: merge patches by a 3x3 instead of a 2x2 convolution.
        cpe_act: GELU after the depthwise convolutions.
        v2: Florence-2's channel attention, see `ChannelGroupAttention`.
        norms: "head": LayerNorm on the pooled features; "stages": on the map of every stage, as for detection and
            segmentation; "none".
        drop_path: stochastic depth of the last block, linear from 0 over single blocks.
        conv_init: start the convolutions from a normal distribution of deviation 0.02 and bias 0, as the linear layers.
    """

    img_size: int = 224
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000
    dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (1, 1, 3, 1)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    blocks: tuple[str, ...] = _KINDS
    ffn: bool = True
    overlapped: bool = False
    cpe_act: bool = False
    v2: bool = False
    norms: str = "head"
    drop_path: float = 0.1
    conv_init: bool = False

    def __post_init__(self) -> None:
        if not len(self.dims) == len(self.depths) == len(self.num_heads) > 0:
            raise ValueError(
                f"dims={self.dims}, depths={self.depths} and num_heads={self.num_heads} need one entry per stage"
            )
        if self.patch_size not in (1, 2, 4):
            raise ValueError(f"patch_size={self.patch_size} must be 4, or 2 or 1 for small images")
        if not self.blocks:
            raise ValueError(f"blocks={self.blocks} must name at least one of {_KINDS}")
        for kind in self.blocks:
            if kind not in _KINDS:
                raise ValueError(unknown("block", kind, _KINDS))
        if self.norms not in _NORMS:
            raise ValueError(unknown("place of norms", self.norms, _NORMS))


@provides("24-davit")
@dataclass(frozen=True)
class BlockCost:
    """What one block of `DaViT` costs for one image.

    Args:
        stage: number of the stage, from 0.
        kind: "spatial" or "channel".
        tokens: N = H * W.
        multiply_adds: of attention, depthwise convolutions and MLP.
        dense: the same were its attention between all N tokens.
    """

    stage: int
    kind: str
    tokens: int
    multiply_adds: int
    dense: int


class PositionConv(nn.Module):
    """x + dwconv3x3(x) on (B, H, W, C), by which tokens learn where they are; optionally GELU after the convolution."""

    def __init__(self, dim: int, act: bool = False) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.act = act

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        y = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + (F.gelu(y) if self.act else y)


class Merge(nn.Module):
    """LayerNorm, zeros at the bottom and right to even sides, strided convolution: (B, H, W, C) -> (B, H/2, W/2, D)."""

    def __init__(self, dim_in: int, dim: int, overlapped: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim_in)
        self.proj = nn.Conv2d(dim_in, dim, 3 if overlapped else 2, 2, padding=int(overlapped))

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w D"]:
        x = pad_to_multiple(self.norm(x).permute(0, 3, 1, 2), 2)
        return self.proj(x).permute(0, 2, 3, 1)


@provides("24-davit")
class DaViTBlock(nn.Module):
    """A spatial or a channel block on (B, H, W, C), according to its attention; the module has the equations.

    Args:
        attention: mixes (B, H, W, C).
        mlp_ratio: hidden width of the MLP over the channels.
        ffn: False leaves out the MLP and its norm; the second convolution stays.
        cpe_act: GELU after the convolutions.
        drop_path: probability of skipping attention, and MLP, while training, per image.
    """

    def __init__(
        self,
        attention: WindowAttention | ChannelGroupAttention,
        mlp_ratio: float = 4.0,
        *,
        ffn: bool = True,
        cpe_act: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        dim = attention.dim
        self.dim = dim
        self.hidden = int(dim * mlp_ratio) if ffn else 0
        self.cpe = nn.ModuleList(PositionConv(dim, cpe_act) for _ in range(2))
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.ffn = ffn
        if ffn:
            self.norm2 = nn.LayerNorm(dim)
            self.mlp = Mlp(dim, self.hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe[1](x)
        return x + self.drop_path(self.mlp(self.norm2(x))) if self.ffn else x

    def cost(self, stage: int, height: int, width: int) -> BlockCost:
        """What the block costs on a map of height x width tokens."""
        tokens = height * width
        rest = 2 * tokens * self.dim * (self.hidden + 9)
        return BlockCost(
            stage,
            "spatial" if isinstance(self.attn, WindowAttention) else "channel",
            tokens,
            rest + self.attn.multiply_adds(height, width),  # type: ignore[operator]
            rest + 4 * tokens * self.dim**2 + 2 * tokens**2 * self.dim,
        )


# Our names, which are the official repository's, and those of the other homes of DaViT's weights.
_LAYOUTS = {
    "official": (),
    "timm": (
        (r"^patch_embeds\.0\.proj\.", "stem.conv."),
        (r"^patch_embeds\.0\.norm\.", "stem.norm."),
        (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
        (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
        (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
        (r"\.cpe\.0\.", ".cpe1."),
        (r"\.cpe\.1\.", ".cpe2."),
        (r"^norms\.", "head.norm."),
        (r"^head\.(weight|bias)", r"head.fc.\1"),
    ),
    "florence2": (  # microsoft/Florence-2-*, under "vision_tower."
        (r"^patch_embeds\.", "convs."),
        (r"^main_blocks\.", "blocks."),
        (r"\.cpe\.0\.proj\.", ".conv1.fn.dw."),
        (r"\.cpe\.1\.proj\.", ".conv2.fn.dw."),
        (r"\.(spatial|channel)\.norm1\.", r".\1.\1_attn.norm."),
        (r"\.(spatial|channel)\.attn\.", r".\1.\1_attn.fn."),
        (r"\.norm2\.", ".ffn.norm."),
        (r"\.mlp\.", ".ffn.fn.net."),
        (r"\.(spatial|channel)\.", r".\1_block."),
        (r"\.spatial_attn\.", ".window_attn."),
    ),
    "transformers": (  # Florence2VisionBackbone
        (r"^patch_embeds\.(\d+)\.proj\.", r"convs.\1.conv."),
        (r"^patch_embeds\.", "convs."),
        (r"^main_blocks\.", "blocks."),
        (r"\.cpe\.0\.proj\.", ".conv1."),
        (r"\.cpe\.1\.proj\.", ".conv2."),
        (r"\.spatial\.attn\.", ".spatial.window_attn."),
        (r"\.channel\.attn\.", ".channel.channel_attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.(spatial|channel)\.", r".\1_block."),
    ),
}
# A key by which a layout is recognised.
_MARKS = {"stem.conv.weight": "timm", "convs.0.proj.weight": "florence2", "convs.0.conv.weight": "transformers"}
_PREFIX = re.compile(r"^(model\.)?(backbone|vision_tower)\.")
# What surrounds the backbone in the authors' detection and segmentation checkpoints.
_TASK_PARTS = ("neck.", "rpn_head.", "roi_head.", "bbox_head.", "decode_head.", "auxiliary_head.")


@provides("24-davit")
class DaViT(Backbone):
    """(B, in_chans, H, W) images of any size to (B, num_classes) logits; see the module for the equations.

    `forward_intermediates` gives the pyramid: one map per stage. Weights come from the official repository, from timm and
    from both forms of Florence-2 by `from_authors`, and go there by `export_weights`.
    """

    Config = DaViTConfig
    takes_any_size = True

    def __init__(self, config: DaViTConfig) -> None:
        super().__init__(config)
        self.num_classes = config.num_classes
        self.num_features = config.dims[-1]
        stages = range(len(config.dims))
        kind_of_norm = "norm{}" if config.norms == "stages" else "main_blocks.{}"
        self.feature_info = pyramid_info(config.dims, config.patch_size, kind_of_norm)
        p = config.patch_size
        self.patch_embeds = nn.ModuleList(
            Merge(config.dims[i - 1], config.dims[i], config.overlapped)
            if i
            else PatchEmbed(config.in_chans, config.dims[0], p, 2 * p - 1, p - 1)
            for i in stages
        )
        kinds = config.blocks
        rates = [iter(part) for part in drop_path_rates(config.drop_path, [d * len(kinds) for d in config.depths])]
        self.main_blocks = nn.ModuleList(
            nn.Sequential(
                *(
                    nn.Sequential(*(_block(config, i, kind, next(rates[i])) for kind in kinds))
                    for _ in range(config.depths[i])
                )
            )
            for i in stages
        )
        if config.norms == "stages":
            for i in stages:  # the names of the authors' detection code
                self.add_module(f"norm{i}", nn.LayerNorm(config.dims[i]))
        self.norms = nn.LayerNorm(self.num_features) if config.norms == "head" else nn.Identity()
        self.head = self.classifier(config.num_classes)
        self.apply(init_linear)
        if config.conv_init:
            self.apply(_init_conv)

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        if x.ndim != 4 or x.shape[1] != self.config.in_chans:
            raise ValueError(f"input {tuple(x.shape)}: this model takes images (B, {self.config.in_chans}, H, W)")
        maps = []
        for i, (embed, blocks) in enumerate(zip(self.patch_embeds, self.main_blocks, strict=True)):
            x = blocks(embed(x))
            tokens = self.get_submodule(f"norm{i}")(x) if self.config.norms == "stages" else x
            maps.append(tokens.permute(0, 3, 1, 2))
        return maps

    def forward_head(self, x: Float[Tensor, "B C h w"], pre_logits: bool = False) -> Tensor:
        pooled = self.norms(x.mean((2, 3)))
        return pooled if pre_logits else self.head(pooled)

    def complexity(self, height: int | None = None, width: int | None = None) -> list[BlockCost]:
        """Tokens and multiply-adds of every block for one image of height x width pixels (default img_size)."""
        costs = []
        sides = [height or self.config.img_size, width or self.config.img_size]
        for i, blocks in enumerate(self.main_blocks):
            stride = 2 if i else self.config.patch_size
            sides = [-(-side // stride) for side in sides]
            costs += [block.cost(i, *sides) for dual in blocks for block in dual]  # type: ignore[union-attr]
        return costs

    def multiply_adds(self, height: int | None = None, width: int | None = None) -> int:
        """Multiply-adds for one image of height x width pixels (default img_size): blocks, embeddings and classifier."""
        total = sum(cost.multiply_adds for cost in self.complexity(height, width))
        sides = [height or self.config.img_size, width or self.config.img_size]
        for i, embed in enumerate(self.patch_embeds):
            stride = 2 if i else self.config.patch_size
            sides = [-(-side // stride) for side in sides]
            total += sides[0] * sides[1] * embed.proj.weight.numel()  # type: ignore[union-attr]
        return total + self.num_features * self.num_classes

    def load_authors(self, weights: dict[str, Tensor], source: str = "the authors' weights") -> Self:
        """Load a state dict of the official repository, timm, Florence-2 or transformers, told apart by its names."""
        inside = {_PREFIX.sub("", key): value for key, value in weights.items() if _PREFIX.match(key)}
        weights = inside or weights
        layout = next((layout for mark, layout in _MARKS.items() if mark in weights), "official")
        names = {self._exported(key, layout): key for key in self.state_dict()}
        own = {names.get(k, k): value for k, value in weights.items() if not k.startswith(_TASK_PARTS)}
        load_weights(self, own, source)
        return self

    def export_weights(self, layout: str) -> dict[str, Tensor]:
        """The state dict by the names of another implementation.

        Args:
            layout: "official", "timm", "florence2" (without the prefix "vision_tower.") or "transformers".
        """
        if layout not in _LAYOUTS:
            raise ValueError(unknown("layout", layout, _LAYOUTS))
        return {self._exported(key, layout): value for key, value in self.state_dict().items()}

    def _exported(self, key: str, layout: str) -> str:
        if layout in ("florence2", "transformers"):  # they name the two blocks, the others number them
            kinds = self.config.blocks
            key = re.sub(r"^(main_blocks\.\d+\.\d+)\.(\d+)\.", lambda found: f"{found[1]}.{kinds[int(found[2])]}.", key)
        for ours, theirs in _LAYOUTS[layout]:
            key = re.sub(ours, theirs, key)
        return key


def _block(config: DaViTConfig, stage: int, kind: str, drop_path: float) -> DaViTBlock:
    dim, heads = config.dims[stage], config.num_heads[stage]
    if kind == "spatial":
        attention = WindowAttention(dim, heads, config.window_size, qkv_bias=config.qkv_bias)
    else:
        attention = ChannelGroupAttention(dim, heads, qkv_bias=config.qkv_bias, v2=config.v2)
    return DaViTBlock(attention, config.mlp_ratio, ffn=config.ffn, cpe_act=config.cpe_act, drop_path=drop_path)


def _init_conv(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _scaled(dim: int, heads: int, **settings: object) -> DaViTConfig:
    return DaViTConfig(
        dims=tuple(dim * 2**i for i in range(4)),
        num_heads=tuple(heads * 2**i for i in range(4)),
        **settings,  # type: ignore[arg-type]
    )


_DEEP = (1, 1, 9, 1)
_BASE = _scaled(128, 4, depths=_DEEP, drop_path=0.4)
_HUGE = _scaled(256, 8, depths=_DEEP, drop_path=0.4)
_FLORENCE = {"img_size": 768, "num_classes": 0, "window_size": 12, "overlapped": True, "v2": True, "norms": "none"}

register_models(
    DaViT,
    # For images of 8 to 32 pixels a side: the size of `vit_micro`, two stages.
    davit_micro=DaViTConfig(
        img_size=8,
        patch_size=1,
        in_chans=1,
        num_classes=10,
        dims=(32, 64),
        depths=(1, 1),
        num_heads=(2, 4),
        window_size=4,
        drop_path=0.0,
    ),
    davit_tiny=DaViTConfig(),
    davit_small=DaViTConfig(depths=_DEEP, drop_path=0.2),
    davit_base=_BASE,
    davit_large=_scaled(192, 6, depths=_DEEP, img_size=384, window_size=12, drop_path=0.4),
    davit_huge=_HUGE,
    davit_giant=_scaled(384, 12, depths=(1, 1, 12, 3), drop_path=0.4),
    # The vision towers of Florence-2-base and -large.
    davit_base_florence2=replace(_BASE, **_FLORENCE),
    davit_huge_florence2=replace(_HUGE, **_FLORENCE),
)
