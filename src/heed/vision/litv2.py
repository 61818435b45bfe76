"""LITv2 (card 23): a four-stage backbone of convolutional MLP blocks, with HiLo attention in the two later stages.

    x = LN(conv4x4/4(image))                                        (B, H/4, W/4, C)
    stages 1, 2:   x = x + ConvMLP(LN(x))
    stages 3, 4:   x = x + HiLo(LN(x));  x = x + ConvMLP(LN(x))
    between:       x = GELU(BN(deformable conv2x2/2(x)))            sides halved, channels doubled
    logits = head(mean(LN(x)))

ConvMLP is Linear, depthwise 3x3 convolution, GELU, Linear; the convolution's zero padding stands in for position
embeddings. Pan, Cai, Zhuang, "Fast Vision Transformers with HiLo Attention", NeurIPS 2022, arXiv 2205.13213; deformable
token merging is from the same authors' "Less is More: Pay Less Attention in Vision Transformers", AAAI 2022.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.hilo import HiLoAttention
from heed.models import register_models
from heed.vision.backbone import Backbone
from heed.vision.parts import ConvMlp, PatchEmbed, drop_path_rates, init_linear, pyramid_info


@provides("23-hilo")
@dataclass(frozen=True)
class LITv2Config:
    """Settings of `LITv2`; the defaults are LITv2-S.

    Args:
        img_size: side in pixels that `flops` counts for; the model takes images of any size.
        patch_size: side of a patch in pixels.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dim: channels of the first stage; each later stage has twice as many as the one before.
        depths: blocks per stage.
        num_heads: heads per stage; unused where a stage has no attention.
        windows: HiLo's window side per stage in tokens; 0 for a stage without attention, 1 for full attention.
        alpha: share of low-frequency heads.
        mlp_ratio: hidden width of the MLP over the stage's channels.
        qkv_bias: whether the query, key and value projections have biases.
        drop_path: stochastic depth of the last block, linear from 0.
        stage_norms: a LayerNorm on each stage's map instead of one on the last, as the authors' dense tasks have it.
    """

    img_size: int = 224
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000
    dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    windows: tuple[int, ...] = (0, 0, 2, 1)
    alpha: float = 0.9
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path: float = 0.2
    stage_norms: bool = False

    def __post_init__(self) -> None:
        if not len(self.depths) == len(self.num_heads) == len(self.windows) > 0:
            raise ValueError(
                f"depths={self.depths}, num_heads={self.num_heads} and windows={self.windows} need one entry per stage"
            )


@provides("23-hilo")
class ConvFFNBlock(nn.Module):
    """x + ConvMLP(LN(x)) on (B, H, W, C); the convolution tells the tokens where they are.

    Args:
        dim: channels C.
        mlp_ratio: hidden width of the MLP over dim.
        drop_path: probability of skipping the MLP while training, per image.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def flops(self, height: int, width: int) -> int:
        weights = sum(layer.weight.numel() for layer in (self.mlp.fc1, self.mlp.dwconv, self.mlp.fc2))
        return height * width * (weights + self.mlp.fc1.in_features)


@provides("23-hilo")
class HiLoBlock(ConvFFNBlock):
    """x + attention(LN(x)), then the ConvFFN block, on (B, H, W, C).

    Args:
        attention: usually a `HiLoAttention`; (B, H, W, C) -> (B, H, W, C).
        mlp_ratio, drop_path: as in `ConvFFNBlock`.
    """

    def __init__(self, attention: HiLoAttention, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__(attention.dim, mlp_ratio, drop_path)
        self.norm1 = nn.LayerNorm(attention.dim)
        self.attn = attention

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return super().forward(x + self.drop_path(self.attn(self.norm1(x))))

    def flops(self, height: int, width: int) -> int:
        return super().flops(height, width) + self.attn.flops(height, width) + height * width * self.attn.dim


@provides("23-hilo")
class DeformableTokenMerging(nn.Module):
    """Merges 2x2 tokens into one, sampled at four learned displacements: (B, H, W, C) -> (B, H/2, W/2, 2C).

    GELU(BN(deformable conv2x2/2(x, offsets))), offsets = conv2x2/2(x), (dy, dx) in tokens for each of the four samples,
    zero at first. An odd side loses its last row or column, with a warning.

    Args:
        dim: channels C of the input.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(dim, 8, 2, 2)
        self.conv = nn.Conv2d(dim, 2 * dim, 2, 2)
        self.norm = nn.BatchNorm2d(2 * dim)
        for parameter in (self.offset.weight, self.offset.bias, self.conv.bias):
            nn.init.zeros_(parameter)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w C2"]:
        height, width = x.shape[1:3]
        if min(height, width) < 2:
            raise ValueError(f"a map of {height} x {width} tokens cannot be halved; give a larger image")
        if height % 2 or width % 2:
            warnings.warn(
                f"a map of {height} x {width} tokens is halved by dropping its last odd row or column; "
                "pad the image to avoid this",
                stacklevel=2,
            )
        x = x.permute(0, 3, 1, 2)
        merged = deformable_merge(x, self.offset(x), self.conv.weight, self.conv.bias)
        return F.gelu(self.norm(merged)).permute(0, 2, 3, 1)

    def flops(self, height: int, width: int) -> int:
        weights = self.offset.weight.numel() + self.conv.weight.numel() + self.norm.num_features
        return (height // 2) * (width // 2) * weights


def deformable_merge(
    x: Float[Tensor, "B C H W"], offset: Float[Tensor, "B 8 h w"], weight: Tensor, bias: Tensor | None
) -> Float[Tensor, "B D h w"]:
    """Deformable 2x2 convolution with stride 2; the numbers of torchvision's deform_conv2d.

    Kernel and stride are equal, so every pixel belongs to one output. Moving the samples is then resampling the whole
    map (bilinear, zeros outside), and an ordinary strided convolution follows. It needs no operator of its own, so
    it runs in every precision and on every device.

    Args:
        x: (B, C, H, W) map.
        offset: (B, 8, h, w), ordered [sample, row-major][dy, dx], in pixels.
        weight, bias: (D, C, 2, 2) and (D,).
    """
    batch, h, w = x.shape[0], *offset.shape[2:]
    precise = torch.promote_types(x.dtype, torch.float32)  # sampling positions need more than half precision
    # (B, a, b, axis, h, w) -> (B, h, a, w, b, axis) -> the offset of every pixel
    moved = offset.to(precise).view(batch, 2, 2, 2, h, w).permute(0, 4, 1, 5, 2, 3).reshape(batch, 2 * h, 2 * w, 2)
    rows = torch.arange(2 * h, device=x.device, dtype=precise)[:, None] + moved[..., 0]
    columns = torch.arange(2 * w, device=x.device, dtype=precise) + moved[..., 1]
    # grid_sample wants positions as shares of the map. On sides that are powers of two whole pixels stay whole, and
    # offsets of 0, where bilinear interpolation has a kink, get torchvision's gradient.
    height, width = (1 << (side - 1).bit_length() for side in x.shape[2:])
    x = F.pad(x.to(precise), (0, width - x.shape[3], 0, height - x.shape[2]))
    at = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)
    sampled = F.grid_sample(x, at, mode="bilinear", padding_mode="zeros", align_corners=False)
    return F.conv2d(sampled.to(weight.dtype), weight, bias, stride=2)


class Stage(nn.Module):
    """The blocks of one resolution, and the merging that leads to the next."""

    def __init__(self, blocks: list[ConvFFNBlock], downsample: DeformableTokenMerging | nn.Identity) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Float[Tensor, "B H W C"]) -> tuple[Float[Tensor, "B H W C"], Float[Tensor, "B h w D"]]:
        """The stage's map, and what the next stage starts from."""
        x = self.blocks(x)
        return x, self.downsample(x)

    def flops(self, height: int, width: int) -> int:
        return sum(part.flops(height, width) for part in (*self.blocks, self.downsample) if hasattr(part, "flops"))  # type: ignore[operator]


# The authors' names and ours; "norm0".."norm3" belong to their detection and segmentation checkpoints.
_RENAMES = (
    (r"^backbone\.", ""),
    (r"^layers\.", "stages."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"\.dconv\.conv_offset\.", ".offset."),
    (r"\.dconv\.", ".conv."),
    (r"\.norm_layer\.", ".norm."),
    (r"^norm(\d)\.", r"norms.\1."),
)
# What surrounds the backbone in their detection and segmentation checkpoints.
_TASK_PARTS = ("neck.", "rpn_head.", "roi_head.", "bbox_head.", "decode_head.", "auxiliary_head.")


@provides("23-hilo")
class LITv2(Backbone):
    """(B, in_chans, H, W) images of any size to (B, num_classes) logits; see the module for the equations.

    `forward_intermediates` gives the pyramid: one map per stage, before merging.
    """

    Config = LITv2Config
    takes_any_size = True

    def __init__(self, config: LITv2Config) -> None:
        super().__init__(config)
        count = len(config.depths)
        dims = [config.dim * 2**i for i in range(count)]
        rates = drop_path_rates(config.drop_path, config.depths)
        self.num_classes = config.num_classes
        self.num_features = dims[-1]
        self.feature_info = pyramid_info(
            dims, config.patch_size, "norms.{}" if config.stage_norms else "stages.{}.blocks"
        )
        self.patch_embed = PatchEmbed(config.in_chans, config.dim, config.patch_size)
        self.stages = nn.ModuleList(
            Stage(
                [_block(config, i, dim, rate) for rate in rates[i]],
                DeformableTokenMerging(dim) if i < count - 1 else nn.Identity(),
            )
            for i, dim in enumerate(dims)
        )
        if config.stage_norms:
            self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        else:
            self.norm = nn.LayerNorm(dims[-1])
        self.head = self.classifier(config.num_classes)
        self.apply(init_linear)

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        x = self.patch_embed(x)
        maps = []
        for i, stage in enumerate(self.stages):
            tokens, x = stage(x)
            maps.append((self.norms[i](tokens) if self.config.stage_norms else tokens).permute(0, 3, 1, 2))
        return maps

    def finish(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x if self.config.stage_norms else self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def flops(self, height: int | None = None, width: int | None = None) -> int:
        """Multiply-adds for one image of height x width pixels (default img_size), counted as the authors do."""
        p = self.config.patch_size
        rows, columns = (-(-(side or self.config.img_size) // p) for side in (height, width))
        total = rows * columns * (self.patch_embed.proj.weight.numel() + self.config.dim)
        for i, stage in enumerate(self.stages):
            total += stage.flops(rows >> i, columns >> i)  # type: ignore[operator]
        last = len(self.stages) - 1
        return total + self.num_features * ((rows >> last) * (columns >> last) + self.num_classes)

    def parameter_groups(
        self, lr: float, weight_decay: float = 0.05, offset_factor: float = 0.01
    ) -> list[dict[str, Any]]:
        """Groups for an optimiser as the authors train: offsets learn slower, biases and norms do not decay.

        Args:
            lr: learning rate.
            weight_decay: of matrices and kernels.
            offset_factor: what lr is multiplied by for the convolutions that predict offsets.
        """
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            groups.setdefault((".offset." in name, parameter.ndim > 1), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": lr * offset_factor if offset else lr,
                "weight_decay": weight_decay if decays else 0.0,
            }
            for (offset, decays), parameters in groups.items()
        ]

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        if key.startswith(_TASK_PARTS):
            return None
        for theirs, ours in _RENAMES:
            key = re.sub(theirs, ours, key)
        return key

    @property
    def least_side(self) -> int:
        return self.config.patch_size * (2 ** (len(self.config.depths) - 1) - 1) + 1


def _block(config: LITv2Config, stage: int, dim: int, drop_path: float) -> ConvFFNBlock:
    if config.windows[stage] == 0:
        return ConvFFNBlock(dim, config.mlp_ratio, drop_path)
    attention = HiLoAttention(
        dim,
        config.num_heads[stage],
        qkv_bias=config.qkv_bias,
        window_size=config.windows[stage],
        alpha=config.alpha,
    )
    return HiLoBlock(attention, config.mlp_ratio, drop_path)


_SMALL = LITv2Config()
_BASE = LITv2Config(dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path=0.5)

register_models(
    LITv2,
    # For images of 8 to 32 pixels a side: the size of `vit_micro`, two stages, attention in both.
    litv2_micro=LITv2Config(
        img_size=8,
        patch_size=1,
        in_chans=1,
        num_classes=10,
        dim=32,
        depths=(2, 4),
        num_heads=(4, 4),
        windows=(0, 2),
        alpha=0.5,
        mlp_ratio=2.0,
        drop_path=0.0,
    ),
    litv2_s=_SMALL,
    litv2_m=replace(_SMALL, depths=(2, 2, 18, 2), drop_path=0.3),
    litv2_b=_BASE,
    litv2_b_384=replace(_BASE, img_size=384),
    # LITv2-S with other shares of low-frequency heads; litv2_s has 0.9.
    litv2_s_alpha0=replace(_SMALL, alpha=0.0),
    litv2_s_alpha02=replace(_SMALL, alpha=0.2),
    litv2_s_alpha04=replace(_SMALL, alpha=0.4),
    litv2_s_alpha05=replace(_SMALL, alpha=0.5),
    litv2_s_alpha07=replace(_SMALL, alpha=0.7),
    litv2_s_alpha1=replace(_SMALL, alpha=1.0),
)
