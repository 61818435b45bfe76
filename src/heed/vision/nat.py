"""NAT and DiNAT (card 58): four-level backbones of neighborhood attention, in DiNAT every other layer dilated.

    x = LN(conv3x3/2(conv3x3/2(image)))                              (B, H/4, W/4, C)
    x = x + g1 * NA(LN(x));  x = x + g2 * MLP(LN(x))                 depth times; g1, g2 (C,) in some sizes only
    NA:  y_i = sum_j softmax_j(q_i . k_j / sqrt(c) + rpb[(j - i) / d]) v_j,  j in the k x k tokens nearest to i that lie
         a multiple of the dilation d away along both axes; rpb (heads, 2k - 1, 2k - 1)
    x = LN(conv3x3/2(x))                                             between levels: sides halved, channels doubled
    logits = head(mean(LN(x)))

Dilations alternate between 1 and floor(side / k), so that L layers reach k^L tokens along an axis where L plain layers
reach 1 + L (k - 1). Parameters and multiply-adds do not change, and weights fit any dilations.

Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, arXiv 2204.07143; Hassani and Shi, "Dilated Neighborhood
Attention Transformer", arXiv 2209.15001. Parameter names are the authors'. The variant with Swin's patches is in
`heed.vision.dinats`, those of a single level in `heed.vision.nat_isotropic`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, cast

import torch
from jaxtyping import Float
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.attention import PatternAttention
from heed.layers.neighborhood import NeighborhoodAttention2D
from heed.models import register_models
from heed.vision.backbone import Backbone
from heed.vision.nat_dilations import Dilations, alternating_dilations
from heed.vision.nat_weights import from_transformers
from heed.vision.parts import drop_path_rates, init_linear, pyramid_info

T = TypeVar("T", bound="NeighborhoodBackbone")
N = TypeVar("N", bound="NAT")


@provides("58-dinat")
@dataclass(frozen=True)
class NATConfig:
    """Settings of `NAT` and `DiNATs`; the defaults are NAT-Mini.

    Args:
        img_size: side in pixels that "alternating" dilations and `flops` are meant for; images may have any size.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dim: channels of the first level; each later level has twice as many as the one before.
        depths: layers per level.
        num_heads: heads per level.
        kernel_size: side k of the windows in tokens; odd.
        dilations: per level one dilation per layer; None for 1 everywhere (NAT); "alternating" for
            `alternating_dilations` at img_size (DiNAT).
        stem_stride: pixels per token of the first level and axis: 1, 2 or 4 (`DiNATs`: any).
        mlp_ratio: hidden width of the MLP over the level's channels.
        qkv_bias: whether the query, key and value projections have biases.
        layer_scale: initial factor on the channels of each branch; None for no such factors.
        drop: dropout after the stem, the attention and inside the MLP.
        attn_drop: dropout on the attention weights.
        drop_path: stochastic depth of the last layer, linear from 0.
        stage_norms: a LayerNorm on each level's map instead of one on the last, as the authors' dense tasks have it.
    """

    img_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000
    dim: int = 64
    depths: tuple[int, ...] = (3, 4, 6, 5)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    kernel_size: int = 7
    dilations: Dilations | Literal["alternating"] | None = None
    stem_stride: int = 4
    mlp_ratio: float = 3.0
    qkv_bias: bool = True
    layer_scale: float | None = None
    drop: float = 0.0
    attn_drop: float = 0.0
    drop_path: float = 0.2
    stage_norms: bool = False

    def __post_init__(self) -> None:
        if not len(self.depths) == len(self.num_heads) > 0:
            raise ValueError(f"depths={self.depths} and num_heads={self.num_heads} need one entry per level")
        if isinstance(self.dilations, str) and self.dilations != "alternating":
            raise ValueError(f"dilations={self.dilations!r} must be 'alternating', None or one tuple per level")
        found = tuple(map(len, self.schedule))
        if found != tuple(self.depths):
            raise ValueError(
                f"dilations={self.dilations} has {found} entries; depths={self.depths} needs one per layer, or "
                "dilations='alternating'"
            )

    @property
    def schedule(self) -> Dilations:
        """The dilation of every layer, written out."""
        if self.dilations is None:
            return tuple((1,) * depth for depth in self.depths)
        if self.dilations == "alternating":
            return alternating_dilations(self.img_size, self.kernel_size, self.depths, self.stem_stride)
        return cast(Dilations, self.dilations)


@provides("58-dinat")
class NATLayer(nn.Module):
    """x + g1 * attention(LN(x)), then x + g2 * MLP(LN(x)), on (B, H, W, C).

    Args:
        attention: usually `NeighborhoodAttention2D(..., rel_pos_bias=True, pad=True)`; (B, H, W, C) -> (B, H, W, C).
        mlp_ratio: hidden width of the MLP over C.
        layer_scale: initial value of g1 and g2 (C,), here gamma1 and gamma2; None leaves them out.
        drop: dropout inside the MLP.
        drop_path: probability of skipping a branch while training, per image.
    """

    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None

    def __init__(
        self,
        attention: PatternAttention,
        mlp_ratio: float = 4.0,
        *,
        layer_scale: float | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        dim = attention.dim
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)
        for name in ("gamma1", "gamma2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.register_parameter(name, gamma)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        if x.shape[-1] != self.attn.dim:
            raise ValueError(
                f"NATLayer has {self.attn.dim} channels, the input {tuple(x.shape)} has {x.shape[-1]}; "
                "channels come last: (B, H, W, C)"
            )
        x = x + self.drop_path(_scaled(self.gamma1, self.attn(self.norm1(x))))
        return x + self.drop_path(_scaled(self.gamma2, self.mlp(self.norm2(x))))

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds for one map of height x width tokens; tokens that pad it count in the attention."""
        grid, keys = (height, width), height * width
        if isinstance(self.attn, NeighborhoodAttention2D):
            grid, keys = self.attn.padded(grid), math.prod(self.attn.kernel_size)
        dim = self.attn.dim
        attention = math.prod(grid) * (4 * dim**2 + 2 * keys * dim)
        return attention + 2 * height * width * self.mlp.fc1.weight.numel()


def _scaled(gamma: Tensor | None, y: Tensor) -> Tensor:
    return y if gamma is None else gamma * y


@provides("58-dinat")
class ConvTokenizer(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, H / stride, W / stride, dim): two 3x3 convolutions, then LayerNorm.

    Args:
        in_chans: channels of the image.
        dim: channels of the tokens; half of them after the first convolution.
        stride: pixels per token and axis: 4 as the authors have it, 2 or 1 for small images.
    """

    def __init__(self, in_chans: int, dim: int, stride: int = 4) -> None:
        super().__init__()
        if stride not in (1, 2, 4):
            raise ValueError(f"stem_stride={stride} must be 1, 2 or 4, the product of two strides of 1 or 2")
        first, second = (2 if stride > 1 else 1), (2 if stride > 2 else 1)
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, first, 1),
            nn.Conv2d(dim // 2, dim, 3, second, 1),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w dim"]:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


@provides("58-dinat")
class ConvDownsampler(nn.Module):
    """3x3 convolution with stride 2, then LayerNorm: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w C2"]:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Level(nn.Module):
    """The layers of one resolution, and the downsampler that leads to the next."""

    def __init__(self, blocks: list[NATLayer], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Float[Tensor, "B H W C"]) -> tuple[Float[Tensor, "B H W C"], Float[Tensor, "B h w D"]]:
        """The level's map, and what the next level starts from."""
        x = self.blocks(x)
        return x, self.downsample(x)


class NeighborhoodBackbone(Backbone):
    """What `NAT`, `DiNATs` and the isotropic models share: checks of images and of the windows of checkpoints."""

    takes_any_size = True

    def load_authors(self: T, weights: dict[str, Tensor], source: str = "the authors' weights") -> T:
        """Load a state dict that uses the authors' names.

        Raises:
            ValueError: entries missing, left over or of the wrong shape; windows of another size (see `resize_windows`).
        """
        tables = {name: table for name, table in self.named_parameters() if name.endswith("attn.rpb")}
        for key, value in weights.items():
            table = tables.get(self.authors_key(key) or "")
            if table is not None and table.shape[1:] != value.shape[1:]:
                had, has = (value.shape[-1] + 1) // 2, (table.shape[-1] + 1) // 2
                raise ValueError(
                    f"{key} of {source} is for windows of {had}, the model has windows of {has}: load "
                    f"heed.vision.nat_weights.resize_windows(weights, {has}) with load_authors instead"
                )
        return super().load_authors(weights, source)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the authors exempt from weight decay; timm's optimisers ask for them."""
        return {name for name, _ in self.named_parameters() if name.endswith("rpb")}


# What surrounds the backbone in the authors' detection and segmentation checkpoints.
_TASK_PARTS = (
    "neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.", "decode_head.", "auxiliary_head.", "sem_seg_head.",
    "criterion.",
)  # fmt: skip
# The authors' names and ours; "norm0".."norm3" belong to those checkpoints, "layers" to DiNAT_s.
_RENAMES = ((r"^backbone\.", ""), (r"^layers\.", "levels."), (r"^norm(\d)\.", r"norms.\1."))


@provides("58-dinat")
class NAT(NeighborhoodBackbone):
    """(B, in_chans, H, W) images of any size to (B, num_classes) logits: NAT, and DiNAT when it has dilations.

    `forward_intermediates` gives the pyramid: one map per level, before downsampling.
    """

    Config = NATConfig

    def __init__(self, config: NATConfig) -> None:
        super().__init__(config)
        count = len(config.depths)
        dims = [config.dim * 2**i for i in range(count)]
        rates = drop_path_rates(config.drop_path, config.depths)
        self.num_classes = config.num_classes
        self.num_features = dims[-1]
        self.feature_info = pyramid_info(
            dims, config.stem_stride, "norms.{}" if config.stage_norms else "levels.{}.blocks"
        )
        self.patch_embed = self.embedding(config)
        self.pos_drop = nn.Dropout(config.drop)
        self.levels = nn.ModuleList(
            Level(
                [_layer(config, i, *setting) for setting in zip(config.schedule[i], rates[i], strict=True)],
                self.downsampler(dim) if i < count - 1 else nn.Identity(),
            )
            for i, dim in enumerate(dims)
        )
        if config.stage_norms:
            self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        else:
            self.norm = nn.LayerNorm(dims[-1])
        self.head = self.classifier(config.num_classes)
        self.apply(init_linear)

    @staticmethod
    def embedding(config: NATConfig) -> nn.Module:
        """What turns images into tokens."""
        return ConvTokenizer(config.in_chans, config.dim, config.stem_stride)

    @staticmethod
    def downsampler(dim: int) -> nn.Module:
        """What leads from a level of `dim` channels to the next."""
        return ConvDownsampler(dim)

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        x = self.pos_drop(self.patch_embed(x))
        maps = []
        for i, level in enumerate(self.levels):
            tokens, x = level(x)
            maps.append((self.norms[i](tokens) if self.config.stage_norms else tokens).permute(0, 3, 1, 2))
        return maps

    def finish(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x if self.config.stage_norms else self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def set_dilations(self: N, dilations: Dilations | Literal["alternating"] | None) -> N:
        """Change the dilations in place, for images of another size or a dense task; the weights stay.

        Args:
            dilations: as in `NATConfig`, e.g. `alternating_dilations(384)` or `DENSE_DILATIONS["coco"]`.

        Raises:
            ValueError: not one per layer, or a dilation below 1; the model is left as it was.
        """
        config = replace(self.config, dilations=dilations)
        for row in config.schedule:
            for dilation in row:
                _check_dilation(dilation)
        for level, row in zip(self.levels, config.schedule, strict=True):
            for block, dilation in zip(level.blocks, row, strict=True):  # type: ignore[arg-type]
                block.attn.dilation = (dilation, dilation)
        self.config = config
        return self

    def flops(self, height: int | None = None, width: int | None = None) -> int:
        """Multiply-adds for one image of height x width pixels (default img_size): linear layers, convolutions, windows."""
        rows, columns = (self.config.img_size if side is None else side for side in (height, width))
        total = self.num_features * self.num_classes
        for conv in (module for module in self.patch_embed.modules() if isinstance(module, nn.Conv2d)):
            rows, columns = -(-rows // conv.stride[0]), -(-columns // conv.stride[1])
            total += rows * columns * conv.weight.numel()
        for level in self.levels:
            total += sum(block.flops(rows, columns) for block in level.blocks)  # type: ignore[union-attr]
            if not isinstance(level.downsample, nn.Identity):
                rows, columns = -(-rows // 2), -(-columns // 2)
                total += rows * columns * level.downsample.reduction.weight.numel()  # type: ignore[union-attr]
        return total

    def load_authors(self: N, weights: dict[str, Tensor], source: str = "the authors' weights") -> N:
        """Load a state dict that uses the authors' names, or those of transformers' Dinat classes.

        With `stage_norms`, a classifier's weights leave the levels' norms as they are.

        Raises:
            ValueError: as in the base class.
        """
        if any(".attention.self." in key for key in weights):
            weights = from_transformers(weights)
        if self.config.stage_norms and "norm.weight" in weights:
            backbone = {key: value for key, value in weights.items() if not key.startswith(("norm.", "head."))}
            fresh = {
                f"norm{i}.{key}": value for i, norm in enumerate(self.norms) for key, value in norm.state_dict().items()
            }
            weights = fresh | backbone
        return super().load_authors(weights, source)

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        if key.startswith(_TASK_PARTS):
            return None
        for theirs, ours in _RENAMES:
            key = re.sub(theirs, ours, key)
        return key


def _check_dilation(dilation: object) -> None:
    if isinstance(dilation, bool) or not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f"dilation {dilation!r} must be an integer >= 1")


def _layer(config: NATConfig, level: int, dilation: int, drop_path: float) -> NATLayer:
    attention = NeighborhoodAttention2D(
        config.dim * 2**level,
        config.num_heads[level],
        config.kernel_size,
        dilation=dilation,
        rel_pos_bias=True,
        pad=True,
        qkv_bias=config.qkv_bias,
        attn_drop=config.attn_drop,
        proj_drop=config.drop,
    )
    return NATLayer(attention, config.mlp_ratio, layer_scale=config.layer_scale, drop=config.drop, drop_path=drop_path)


@provides("58-dinat")
def dilation_cost(model: NAT, height: int | None = None, width: int | None = None) -> float:
    """Multiply-adds of a model over those of the same model without dilation: checks the claim of no additional cost.

    Args:
        model: a `NAT` or `DiNATs` with dilations.
        height, width: of the image in pixels; default img_size.

    Returns:
        1.0 exactly, or more where a dilated window is larger than its map, which is then padded.
    """
    with torch.device("meta"):
        plain = type(model)(replace(model.config, dilations=None))
    return model.flops(height, width) / plain.flops(height, width)


_MINI = NATConfig()
_TINY = replace(_MINI, depths=(3, 4, 18, 5))
_SMALL = replace(_TINY, dim=96, num_heads=(3, 6, 12, 24), mlp_ratio=2.0, drop_path=0.3)
_BASE = replace(_SMALL, dim=128, num_heads=(4, 8, 16, 32), layer_scale=1e-5, drop_path=0.5)
_LARGE = replace(_SMALL, dim=192, num_heads=(6, 12, 24, 48), drop_path=0.35)


def dilated(config: NATConfig) -> NATConfig:
    """A configuration with the authors' dilations for its img_size, written out."""
    return replace(config, dilations=replace(config, dilations="alternating").schedule)


# For images of 8 to 32 pixels a side: about the size of `vit_micro`, two levels.
_MICRO = NATConfig(
    img_size=8,
    in_chans=1,
    num_classes=10,
    dim=36,
    depths=(2, 2),
    num_heads=(3, 6),
    kernel_size=3,
    stem_stride=1,
    mlp_ratio=2.0,
    drop_path=0.0,
)

register_models(
    NAT,
    dinat_micro=replace(_MICRO, dilations="alternating"),
    nat_micro=_MICRO,
    nat_mini=_MINI,
    nat_tiny=_TINY,
    nat_small=replace(_SMALL, layer_scale=1e-5),
    nat_base=_BASE,
    dinat_mini=dilated(_MINI),
    dinat_tiny=dilated(_TINY),
    dinat_small=dilated(_SMALL),  # without layer scale, unlike nat_small
    dinat_base=dilated(_BASE),
    dinat_large=dilated(_LARGE),
    dinat_large_384=dilated(replace(_LARGE, img_size=384)),
    dinat_large_384_11x11=dilated(replace(_LARGE, img_size=384, kernel_size=11)),
)
