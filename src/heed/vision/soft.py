"""SOFT (card 64): a pyramid whose first three stages attend without softmax, and whose last one does with it.

    stem      3x3 conv /2, 3x3 conv, 3x3 conv /2, each with BN and ReLU            (B, H/4, W/4, C)
    between   3x3 conv /2, BN, ReLU                                                sides halved
    stages    + position embeddings, resized to the map; then
              1-3:  z = LN(x + SOFT(x));  x = LN(z + W_2 GELU_tanh(W_1 z))         post-norm, hidden width 4C
              4:    a class token joins;  x = x + MHSA(LN(x));  x = x + MLP(LN(x))
    logits = head(LN(class token))

Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity", NeurIPS 2021 (arXiv 2110.11945); "Softmax-free Linear
Transformers", IJCV 2024 (arXiv 2207.03341), whose SOFT++ are the models named soft_norm_*. "Softmax-free" is true of
stages 1-3, and "linear" where `num_landmarks` fixes their number: the released strides let it grow with the image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath, GELUTanh, Mlp, trunc_normal_
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import read_weights
from heed.engine.attend import attend
from heed.engine.patterns import Full
from heed.layers.attention import check_heads
from heed.layers.soft import SoftAttention, SoftKernel
from heed.layers.soft import authors_key as layer_key
from heed.models import register_models
from heed.vision.backbone import ClassTokenBackbone
from heed.vision.parts import drop_path_rates, init_linear, pyramid_info


@provides("64-soft")
@dataclass(frozen=True)
class SoftConfig:
    """Settings of `Soft`; the defaults are SOFT-Tiny. Settings per stage have one entry per stage.

    Args:
        img_size: side of the images the configuration is meant for, in pixels; others work too.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dims: channels per stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        ratios: per stage but the last: side of a landmark's patch, in tokens.
        conv_sizes: per stage but the last: odd side of the depthwise convolution of the values; 0 for none.
        normalised: SOFT++.
        iterations: Newton steps.
        num_landmarks, inverse, per_sample: as in `heed.layers.soft.SoftKernel`.
        mlp_ratio: hidden width of the MLP over the channels in the last stage; it is 4 in the others.
        qkv_bias: whether queries, keys and values have biases in the last stage; they have in the others.
        stem_stride: what the stem divides the image's sides by: 1, 2 or 4.
        position_side: rows and columns of the first stage's position embeddings, whatever the image; halved per stage.
        drop_path: of the last block, linear from 0: stochastic depth in the last stage, element-wise dropout of the
            branches in the others, as in the authors' code.
    """

    img_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000
    dims: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (1, 2, 3, 2)
    num_heads: tuple[int, ...] = (2, 4, 10, 16)
    ratios: tuple[int, ...] = (8, 4, 2)
    conv_sizes: tuple[int, ...] = (9, 5, 3)
    normalised: bool = False
    iterations: int = 20
    num_landmarks: int | None = None
    inverse: str = "newton"
    per_sample: bool = False
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    stem_stride: int = 4
    position_side: int = 56
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        stages = len(self.dims)
        for name, entries in (
            ("depths", stages),
            ("num_heads", stages),
            ("ratios", stages - 1),
            ("conv_sizes", stages - 1),
        ):
            if len(getattr(self, name)) != entries:
                raise ValueError(f"{name}={getattr(self, name)} needs {entries} entries for {stages} stages")
        if self.stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride={self.stem_stride} must be 1, 2 or 4")
        if self.position_side >> (stages - 1) == 0:
            raise ValueError(f"position_side={self.position_side} cannot be halved for {stages} stages")


class PositionEmbedding(nn.Module):
    """Learned positions of a square grid, added to maps of any size: resized bilinearly where the sizes differ.

    Args:
        side: rows and columns.
        dim: channels C.
        prefix: entries before the grid's, for class tokens.
    """

    def __init__(self, side: int, dim: int, prefix: int = 0) -> None:
        super().__init__()
        self.side, self.prefix = side, prefix
        self.weight = nn.Parameter(torch.empty(1, prefix + side**2, dim))
        trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        grid = self.weight[:, self.prefix :].unflatten(1, (self.side, self.side))
        if x.shape[1:3] != grid.shape[1:3]:
            maps = F.interpolate(grid.permute(0, 3, 1, 2), x.shape[1:3], mode="bilinear", align_corners=False)
            grid = maps.permute(0, 2, 3, 1)
        return x + grid


@provides("64-soft")
class SoftBlock(nn.Module):
    """Post-norm block of softmax-free attention, (B, H, W, C) -> (B, H, W, C).

    Args:
        attention: usually a `SoftAttention`.
        drop: element-wise dropout of both branches while training.
    """

    def __init__(self, attention: SoftAttention, drop: float = 0.0) -> None:
        super().__init__()
        dim = attention.dim
        self.attn = attention
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=GELUTanh)
        self.norm2 = nn.LayerNorm(dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = self.norm1(x + self.drop(self.attn(x)))
        return self.norm2(x + self.drop(self.mlp(x)))


class SoftmaxAttention(nn.Module):
    """Multi-head self-attention of the last stage, (B, N, C) -> (B, N, C); queries are projected apart from the rest."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.head_dim = check_heads(dim, num_heads)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        heads = (-1, self.head_dim)
        q = self.q(x).unflatten(2, heads).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, Full()).transpose(1, 2).flatten(2))


class SoftmaxBlock(nn.Module):
    """Pre-norm transformer block of the last stage, (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SoftmaxAttention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Convolutions that shrink the map, position embeddings, blocks."""

    def __init__(self, embed: nn.Module, positions: PositionEmbedding, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed = embed
        self.positions = positions
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return self.blocks(self.tokens(x)).permute(0, 3, 1, 2)

    def tokens(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        """What the blocks start from."""
        return self.positions(self.embed(x).permute(0, 2, 3, 1))


# The authors' names of a stage's parts, and ours after "stages.<i>.".
_PARTS = {"patch_embed": "embed", "pos_embed": "positions.weight", "block": "blocks"}


@provides("64-soft")
class Soft(ClassTokenBackbone):
    """(B, in_chans, H, W) images of any size that holds a landmark to (B, num_classes) logits.

    `forward_intermediates` gives the pyramid, one map per stage, the last one without the class token.
    """

    Config = SoftConfig
    takes_any_size = True

    def __init__(self, config: SoftConfig) -> None:
        super().__init__(config)
        last = len(config.dims) - 1
        self.num_classes = config.num_classes
        self.num_features = config.dims[-1]
        self.feature_info = pyramid_info(config.dims, config.stem_stride, "stages.{}")
        rates = drop_path_rates(config.drop_path, config.depths)
        self.stages = nn.ModuleList(
            Stage(
                nn.Sequential(*_conv(config.dims[i - 1], config.dims[i], 2)) if i else _stem(config),
                PositionEmbedding(config.position_side >> i, config.dims[i], prefix=int(i == last)),
                [_softmax_block(config, rate) if i == last else _soft_block(config, i, rate) for rate in rates[i]],
            )
            for i in range(last + 1)
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, self.num_features))
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.head = self.classifier(config.num_classes)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)
        for name, module in self.named_modules():
            if isinstance(module, SoftKernel):
                module.label = name

    def maps_and_token(self, x: Float[Tensor, "B C H W"]) -> tuple[list[Tensor], Tensor]:
        *early, last = cast(list[Stage], list(self.stages))
        maps = []
        for stage in early:
            x = stage(x)
            maps.append(x)
        grid = last.tokens(x)
        token = (self.cls_token + last.positions.weight[:, :1]).expand(len(grid), -1, -1)
        tokens = last.blocks(torch.cat([token, grid.flatten(1, 2)], 1))
        maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, grid.shape[1:3]))
        return maps, self.norm(tokens[:, 0])

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        found = re.fullmatch(r"(patch_embed|pos_embed|block)(\d)(?:\.proj)?(.*)", key)
        if found is None:
            return key
        part, number, rest = found.groups()
        before, attention, inner = rest.partition(".att.mha.")
        rest = (
            f"{before}.attn.{layer_key(inner)}"
            if attention
            else rest.replace(".att.ff", ".mlp.fc").replace(".att.", ".")
        )
        return f"stages.{int(number) - 1}.{_PARTS[part]}{rest}"

    @classmethod
    def from_authors(cls, path: str | Path, name: str, **overrides: Any) -> Soft:
        """As for every model, but with as many blocks as the checkpoint has: the depths of SOFT-Small in the authors'
        code (38.9 million parameters) are not those in their paper (24 million)."""
        blocks = [re.match(r"block(\d)\.(\d+)\.", key) for key in read_weights(path)]
        counts: dict[int, int] = {}
        for found in filter(None, blocks):
            stage, block = int(found[1]), int(found[2])
            counts[stage] = max(counts.get(stage, 0), block + 1)
        depths = {"depths": tuple(counts[stage] for stage in sorted(counts))} if counts else {}
        return super().from_authors(path, name, **depths | overrides)

    @property
    def least_side(self) -> int:
        # The stem and every stage halve a side rounding up, so stage i has ceil(side / (stem_stride * 2^i)) tokens,
        # which must hold a landmark.
        c = self.config
        patches = [1] * len(c.ratios) if c.num_landmarks else c.ratios
        return max((ratio - 1) * c.stem_stride * 2**i + 1 for i, ratio in enumerate(patches))


def _conv(width_in: int, width: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(width_in, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]


def _stem(config: SoftConfig) -> nn.Sequential:
    first, last = (2 if config.stem_stride >= stride else 1 for stride in (2, 4))
    return nn.Sequential(*_conv(config.in_chans, 32, first), *_conv(32, 32, 1), *_conv(32, config.dims[0], last))


def _soft_block(config: SoftConfig, stage: int, drop: float) -> SoftBlock:
    attention = SoftAttention(
        config.dims[stage],
        config.num_heads[stage],
        config.ratios[stage],
        config.conv_sizes[stage],
        iterations=config.iterations,
        normalised=config.normalised,
        per_sample=config.per_sample,
        inverse=config.inverse,
        num_landmarks=config.num_landmarks,
    )
    return SoftBlock(attention, drop)


def _softmax_block(config: SoftConfig, drop_path: float) -> SoftmaxBlock:
    return SoftmaxBlock(config.dims[-1], config.num_heads[-1], config.mlp_ratio, config.qkv_bias, drop_path)


_SIZES = {
    "tiny": SoftConfig(),
    "small": SoftConfig(depths=(1, 3, 20, 4)),
    "medium": SoftConfig(dims=(64, 128, 288, 512), num_heads=(2, 4, 9, 16), depths=(1, 3, 29, 5)),
    "large": SoftConfig(depths=(1, 3, 40, 5)),
    "huge": SoftConfig(dims=(64, 128, 352, 512), num_heads=(2, 4, 11, 16), depths=(1, 5, 49, 5)),
}

register_models(
    Soft,
    # For images of 8 to 32 pixels a side: about the size of `vit_micro`; 16 landmarks whatever the image.
    soft_micro=SoftConfig(
        img_size=8,
        in_chans=1,
        num_classes=10,
        dims=(48, 64),
        depths=(3, 1),
        num_heads=(3, 4),
        ratios=(2,),
        conv_sizes=(3,),
        num_landmarks=16,
        mlp_ratio=2.0,
        stem_stride=1,
        position_side=8,
        drop_path=0.0,
    ),
    **{f"soft_{size}": config for size, config in _SIZES.items()},
    **{f"soft_norm_{size}": replace(config, normalised=True) for size, config in _SIZES.items()},
)


@provides("64-soft")
def training_recipe(name: str = "soft_tiny") -> dict[str, Any]:
    """How the authors train on ImageNet, as options of timm's training script; lr goes with batch_size in all.

    Args:
        name: a SOFT; the huge ones have a learning rate of their own, at a batch of 32 on each of 8 GPUs.
    """
    huge = name.endswith("_huge")
    return {
        "epochs": 300,
        "batch_size": 8 * (32 if huge else 128),
        "opt": "adamw",
        "lr": 2.7e-4 if huge else 1e-3,
        "weight_decay": 0.05,
        "sched": "cosine",
        "min_lr": 5e-5,
        "warmup_epochs": 10,
        "clip_grad": 1.0,
        "drop_path": 0.1,
        "aa": "rand-m9",
        "mixup": 0.8,
        "cutmix": 1.0,
        "smoothing": 0.1,
        "reprob": 0.25,
        "model_ema": True,
        "model_ema_decay": 0.99996,
    }
