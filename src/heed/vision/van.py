"""VAN (card 25), Visual Attention Network: four stages of convolutions gated by large kernel attention.

    x = BN(conv(x))                                  (B, C, H/4, W/4) first, then sides halved; kernels overlap
    x = x + s_1 * Attention(BN(x))                   depth times; Attention is `heed.layers.lka.VANAttention`
    x = x + s_2 * ConvFFN(BN(x))                     ConvFFN(x) = W_2 GELU(DWConv3x3(W_1 x))
    x = LN(x)                                        the stage's map, and what the next stage starts from
    logits = head(mean of the last map)

s_1, s_2 are learned per channel and start at 0.01. Guo, Lu, Liu, Cheng, Hu, "Visual Attention Network", Computational
Visual Media 2023, arXiv 2202.09741.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from typing import Self

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath, LayerNorm2d, LayerScale2d, trunc_normal_
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.layers.lka import VANAttention
from heed.models import register_models
from heed.vision.backbone import Backbone
from heed.vision.parts import check_norm_batch, drop_path_rates, pyramid_info


@provides("25-van")
@dataclass(frozen=True)
class VANConfig:
    """Settings of `VAN`; settings per stage have one entry per stage. The defaults are VAN-B0.

    Args:
        img_size: side in pixels of the images the configuration is meant for; others work too.
        patch_size: pixels per position of the first map and axis; its convolution has kernel 2 * patch_size - 1.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dims: channels per stage.
        mlp_ratios: hidden width of the ConvFFN over the channels, per stage.
        depths: blocks per stage.
        kernel_size, dilation, combine, omit: of the attention, see `heed.layers.lka.LKA`.
        drop: dropout in the ConvFFN.
        drop_path: stochastic depth of the last block, linear from 0.
        norm_eps: of the LayerNorms; the authors' dense prediction models have 1e-5.
        head_init_scale: factor on the classifier's initial weights; the authors fine-tune from 0.001.
    """

    img_size: int = 224
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000
    dims: tuple[int, ...] = (32, 64, 160, 256)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    depths: tuple[int, ...] = (3, 3, 5, 2)
    kernel_size: int = 21
    dilation: int = 3
    combine: str = "multiply"
    omit: tuple[str, ...] = ()
    drop: float = 0.0
    drop_path: float = 0.1
    norm_eps: float = 1e-6
    head_init_scale: float = 1.0

    def __post_init__(self) -> None:
        if not len(self.dims) == len(self.mlp_ratios) == len(self.depths) > 0:
            raise ValueError(
                f"dims={self.dims}, mlp_ratios={self.mlp_ratios} and depths={self.depths} need one entry per stage"
            )
        if self.patch_size < 1:
            raise ValueError(f"patch_size={self.patch_size} must be at least 1 pixel")


class ConvFFN(nn.Module):
    """1 x 1 convolution, depthwise 3 x 3, GELU, 1 x 1, on channels-first maps, as all of VAN: (B, C, H, W) -> same."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return self.drop(self.fc2(self.drop(F.gelu(self.dwconv(self.fc1(x))))))


@provides("25-van")
class VANBlock(nn.Module):
    """Attention and ConvFFN, each after a BatchNorm, scaled and added: (B, dim, H, W) -> (B, dim, H, W).

    Args:
        attention: usually a `VANAttention`.
        mlp_ratio: hidden width of the ConvFFN over the channels.
        drop: dropout in the ConvFFN.
        drop_path: probability of skipping either part while training, per image.
    """

    def __init__(
        self, attention: VANAttention, mlp_ratio: float = 4.0, drop: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        dim = attention.dim
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = attention
        self.ls1 = LayerScale2d(dim, 0.01)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = ConvFFN(dim, int(dim * mlp_ratio), drop)
        self.ls2 = LayerScale2d(dim, 0.01)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Stage(nn.Module):
    """A strided convolution with BatchNorm, the blocks, LayerNorm: (B, C, H, W) -> (B, C', ceil(H/s), ceil(W/s))."""

    def __init__(self, in_dim: int, dim: int, stride: int, blocks: list[VANBlock], norm_eps: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 2 * stride - 1, stride, stride - 1)
        self.proj_norm = nn.BatchNorm2d(dim)
        self.blocks = nn.Sequential(*blocks)
        self.norm = LayerNorm2d(dim, norm_eps)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return self.norm(self.blocks(self.proj_norm(self.proj(x))))


# The authors number stages from 1 and hold a stage's parts side by side: patch_embed1, block1, norm1, patch_embed2, ...
_RENAMES = (
    (r"^backbone\.", ""),
    (r"^patch_embed(\d)\.proj\.", r"stages.\1.proj."),
    (r"^patch_embed(\d)\.norm\.", r"stages.\1.proj_norm."),
    (r"^block(\d)\.", r"stages.\1.blocks."),
    (r"^norm(\d)\.", r"stages.\1.norm."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"\.layer_scale_(\d)$", r".ls\1.gamma"),
)
# What surrounds the backbone in detection and segmentation checkpoints.
_TASK_PARTS = ("neck.", "rpn_head.", "roi_head.", "bbox_head.", "decode_head.", "auxiliary_head.")


@provides("25-van")
class VAN(Backbone):
    """(B, in_chans, H, W) images of any size to (B, num_classes) logits; see the module for the equations.

    `forward_intermediates` gives the pyramid for dense prediction: the four maps after their LayerNorms, at strides 4, 8,
    16, 32. For the authors' segmentation backbones use num_classes=0 and norm_eps=1e-5.

    Earlier names of VAN-B0 to B3 are van_tiny, van_small, van_base and van_large.
    """

    Config = VANConfig
    takes_any_size = True

    def __init__(self, config: VANConfig) -> None:
        super().__init__(config)
        c = config
        self.num_classes = c.num_classes
        self.num_features = c.dims[-1]
        self.feature_info = pyramid_info(c.dims, c.patch_size, "stages.{}")
        rates = drop_path_rates(c.drop_path, c.depths)
        stages, width = [], c.in_chans
        for i, dim in enumerate(c.dims):
            blocks = [VANBlock(_attention(c, dim), c.mlp_ratios[i], c.drop, rate) for rate in rates[i]]
            stages.append(Stage(width, dim, 2 if i else c.patch_size, blocks, c.norm_eps))
            width = dim
        self.stages = nn.ModuleList(stages)
        self.head = self.classifier(c.num_classes)
        self.apply(_init_conv)

    def classifier(self, num_classes: int) -> nn.Module:
        head = super().classifier(num_classes)
        if isinstance(head, nn.Linear):
            trunc_normal_(head.weight, std=0.02 * self.config.head_init_scale)
            nn.init.zeros_(head.bias)
        return head

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        if key.startswith(_TASK_PARTS):
            return None
        for theirs, ours in _RENAMES:
            key = re.sub(theirs, ours, key)
        return re.sub(r"^stages\.(\d)", lambda found: f"stages.{int(found[1]) - 1}", key)

    def load_authors(self, weights: dict[str, Tensor], source: str = "the authors' weights") -> Self:
        """Load a state dict that uses the authors' names.

        The classifier of another number of classes is left out, with a warning, and the model keeps its own.
        """
        theirs = {name: weights[name] for name in ("head.weight", "head.bias") if name in weights}
        if any(value.shape[0] != self.num_classes for value in theirs.values()):
            shapes = " and ".join(f"{name} {tuple(value.shape)}" for name, value in theirs.items())
            warnings.warn(
                f"{source}: {shapes} are skipped, since this model has num_classes={self.num_classes}", stacklevel=2
            )
            own = {name: value for name, value in self.state_dict().items() if name.startswith("head.")}
            weights = {name: value for name, value in weights.items() if name not in theirs} | own
        return super().load_authors(weights, source)

    def check_images(self, x: Tensor) -> None:
        super().check_images(x)
        if self.training:
            check_norm_batch(x, self.feature_info[-1]["reduction"])


def _attention(config: VANConfig, dim: int) -> VANAttention:
    return VANAttention(dim, config.kernel_size, config.dilation, combine=config.combine, omit=config.omit)


def _init_conv(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_IMAGENET_1K = {
    "opt": "adamw",
    "lr": 1e-3,
    "total_batch_size": 1024,
    "weight_decay": 0.05,
    "epochs": 300,
    "cooldown_epochs": 10,
    "sched": "cosine",
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "min_lr": 1e-6,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "reprob": 0.25,
    "aa": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,
}
_IMAGENET_22K = {
    "opt": "adamw",
    "lr": 4e-3,
    "total_batch_size": 8192,
    "weight_decay": 0.05,
    "epochs": 90,
    "sched": "cosine",
    "warmup_epochs": 5,
    "num_classes": 21841,
    "drop_path": 0.1,
}
_FINE_TUNING = {
    "opt": "adamw",
    "lr": 5e-5,
    "weight_decay": 1e-8,
    "epochs": 30,
    "mixup": 0.0,
    "cutmix": 0.0,
    "head_init_scale": 0.001,
}
_RECIPES = {
    "imagenet_1k": (_IMAGENET_1K, {"van_b0": 0.1, "van_b1": 0.1, "van_b2": 0.1, "van_b3": 0.2}),
    "imagenet_22k": (_IMAGENET_22K, {"van_b4": 0.1, "van_b5": 0.1, "van_b6": 0.1}),
    "fine_tuning": (_FINE_TUNING, {"van_b4": 0.2, "van_b5": 0.2, "van_b6": 0.3}),
}


@provides("25-van")
def van_recipe(name: str, phase: str = "imagenet_1k") -> dict[str, str | int | float]:
    """How the authors trained a model, under the names of timm's training script and of `VANConfig`.

    Args:
        name: "van_b0" to "van_b3" for "imagenet_1k", "van_b4" to "van_b6" for the others.
        phase: "imagenet_1k" (from scratch), "imagenet_22k" (pre-training), or "fine_tuning" of the latter on ImageNet-1K
            at 224 or 384 pixels. lr belongs to total_batch_size, the images per step over all GPUs.

    Raises:
        ValueError: a phase that does not exist, or a model that was not trained so.
    """
    if phase not in _RECIPES:
        raise ValueError(unknown("phase", phase, _RECIPES))
    settings, drop_paths = _RECIPES[phase]
    if name not in drop_paths:
        raise ValueError(unknown(f"model with a recipe for {phase}", name, drop_paths))
    return settings | {"drop_path": drop_paths[name]}


_B1 = VANConfig(dims=(64, 128, 320, 512), depths=(2, 2, 4, 2))

register_models(
    VAN,
    # For images of 8 to 32 pixels: the size of `vit_micro`, two stages, kernels that reach all over 8 x 8 pixels.
    van_micro=VANConfig(
        img_size=8,
        patch_size=1,
        in_chans=1,
        num_classes=10,
        dims=(32, 64),
        mlp_ratios=(2, 2),
        depths=(2, 4),
        kernel_size=14,
        dilation=2,
        drop_path=0.0,
    ),
    van_b0=VANConfig(),
    van_b1=_B1,
    van_b2=replace(_B1, depths=(3, 3, 12, 3)),
    van_b3=replace(_B1, depths=(3, 5, 27, 3), drop_path=0.2),
    van_b4=replace(_B1, depths=(3, 6, 40, 3), drop_path=0.2),
    van_b5=replace(_B1, dims=(96, 192, 480, 768), depths=(3, 3, 24, 3), drop_path=0.2),
    van_b6=replace(_B1, dims=(96, 192, 384, 768), depths=(6, 6, 90, 6), drop_path=0.3),
)
