"""HaloNet (card 04): a ResNet whose 3 x 3 convolutions are halo attention, and hybrids that keep some of them.

    stem      7x7 conv /2, BN, act, 3x3 max-pool /2        (B, 64, H/4, W/4)
    block     y = act(shortcut(x) + BN(W_out act(BN(halo(act(BN(W_in x)))))))
              W_in: C -> m,  halo: m -> m * rv,  W_out: m * rv -> C',  m = 64, 128, 256, 512 and C' = m * rb in H0-H7
    stages    four, at strides 4, 8, 16, 32; the first block of stages 2-4 halves the map
    head      optional 1x1 conv to df, BN, act; average over pixels; linear

Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", CVPR 2021 (arXiv 2103.12731).
H0-H7 have the parameter counts of the paper's table; names from timm (halonet26t, ...) are its networks and load its
checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.layers import (
    BatchNormAct2d,
    ConvNormAct,
    DropPath,
    create_act_layer,
    create_attn,
    get_act_layer,
    make_divisible,
)
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.layers.halo import HaloAttention
from heed.models import create_model, models, register_models
from heed.vision.backbone import Backbone


@provides("04-halonet")
@dataclass(frozen=True)
class HaloNetConfig:
    """Settings of `HaloNet`; settings per stage have one entry per stage.

    Args:
        layout: per stage one letter per block: "h" halo attention, "c" 3x3 convolution.
        channels: per stage the width of its output map.
        bottleneck: per stage the inner width m of a block over its output width (input width if `expand_input`).
        num_heads: per stage the heads of halo attention.
        strides: per stage 1, or 2 to halve the map.
        block_size: side of a block of queries, in pixels; every map must be a multiple of it unless `pad`.
        halo_size: reach of a window beyond its block, in pixels.
        value_ratio: rv, value width over the inner width m; widens the input of the block's last 1x1 alone.
        qk_ratio: query and key width over m.
        dim_head: query and key width per head, in place of qk_ratio.
        padding: "zeros" or "mask", see `HaloAttention`.
        pad: accept maps that are no multiple of block_size.
        stem: widths of the convolutions of the stem.
        stem_kernel: their kernel, in pixels.
        stem_stride: what the stem divides the image's sides by: 1, 2 or 4.
        stem_pool: reach a stem_stride of 4 by max-pooling; otherwise the last convolution is strided.
        final_width: df, width of the last 1x1 convolution; 0 for none.
        act: name of the activation, as timm has it.
        conv_group: channels per group of the 3x3 convolutions; 0 for one group.
        gate: "se" or "eca", a channel gate after the 3x3 convolutions; "" for none.
        gate_ratio: hidden width of the "se" gate over m.
        project_shortcut: when a block changes the map's shape, use a strided 1x1 conv as shortcut; otherwise none.
        expand_input: count m from the block's input width.
        linear_out: no activation after the sum with the shortcut.
        img_size: side of the images the configuration is meant for, in pixels; others work too.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        drop_path: stochastic depth of the last block, linear from 0.
    """

    layout: tuple[str, ...]
    channels: tuple[int, ...]
    bottleneck: tuple[float, ...]
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    block_size: int = 8
    halo_size: int = 3
    value_ratio: float = 1.0
    qk_ratio: float = 1.0
    dim_head: int | None = None
    padding: str = "zeros"
    pad: bool = False
    stem: tuple[int, ...] = (64,)
    stem_kernel: int = 7
    stem_stride: int = 4
    stem_pool: bool = True
    final_width: int = 0
    act: str = "relu"
    conv_group: int = 0
    gate: str = ""
    gate_ratio: float = 1 / 16
    project_shortcut: bool = True
    expand_input: bool = False
    linear_out: bool = False
    img_size: int = 256
    in_chans: int = 3
    num_classes: int = 1000
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for blocks in self.layout:
            if not blocks or set(blocks) - {"h", "c"}:
                raise ValueError(f"layout={self.layout}: {blocks!r} must hold one 'h' (halo) or 'c' (conv) per block")
        for name in ("channels", "bottleneck", "num_heads", "strides"):
            values = getattr(self, name)
            if len(values) != len(self.layout):
                raise ValueError(
                    f"{name}={values} has {len(values)} entries for {len(self.layout)} stages of {self.layout}"
                )
        if set(self.strides) - {1, 2}:
            raise ValueError(f"strides={self.strides} must be 1 or 2 per stage")
        if self.gate not in ("", "se", "eca"):
            raise ValueError(unknown("gate", self.gate, ("", "se", "eca")))
        try:
            get_act_layer(self.act)
        except KeyError as error:
            raise ValueError(
                f"act={self.act!r} is no activation of timm; 'relu' and 'silu' are, for example"
            ) from error
        convs = len(self.stem)
        if self.stem_stride not in (1, 2, 4) or (self.stem_stride == 4 and not self.stem_pool and convs < 2):
            raise ValueError(
                f"stem_stride={self.stem_stride} must be 1, 2 or 4, and 4 takes stem_pool=True or two convolutions; "
                f"here stem={self.stem}"
            )

    @property
    def num_features(self) -> int:
        """Width of the features that are classified."""
        return self.final_width or self.channels[-1]

    def inner(self, stage: int, width_in: int) -> int:
        """m of a block with `width_in` input channels."""
        return make_divisible((width_in if self.expand_input else self.channels[stage]) * self.bottleneck[stage])


class Bottleneck(nn.Module):
    """1x1 conv to the inner width, something that mixes pixels, 1x1 conv back, plus the shortcut."""

    def __init__(
        self, config: HaloNetConfig, stage: int, width_in: int, stride: int, inner_out: int, drop: float
    ) -> None:
        super().__init__()
        width = config.channels[stage]
        self.stride = stride
        self.shortcut: nn.Module | None = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = (
                _conv(config, width_in, width, stride=stride, act=False) if config.project_shortcut else None
            )
        self.conv1_1x1 = _conv(config, width_in, config.inner(stage, width_in))
        self.conv3_1x1 = _conv(config, inner_out, width, act=False)
        self.drop_path = DropPath(drop)
        self.act = nn.Identity() if config.linear_out else cast(nn.Module, create_act_layer(config.act, inplace=True))

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def multiply_adds(self, side: int) -> int:
        """Multiply-adds on a square map of `side` pixels."""
        after = -(-side // self.stride)
        shortcut = _count(self.shortcut, after) if isinstance(self.shortcut, ConvNormAct) else 0
        return _count(self.conv1_1x1, side) + self.mixing(side) + _count(self.conv3_1x1, after) + shortcut

    def mixing(self, side: int) -> int:
        """The share of `mix` in them."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B Cout Hout Wout"]:
        y = self.drop_path(self.conv3_1x1(self.mix(self.conv1_1x1(x))))
        return self.act(y if self.shortcut is None else y + self.shortcut(x))


@provides("04-halonet")
class HaloBottleneck(Bottleneck):
    """Residual block that mixes pixels by halo attention, (B, C, H, W) -> (B, C', H / stride, W / stride)."""

    def __init__(self, config: HaloNetConfig, stage: int, width_in: int, stride: int = 1, drop: float = 0.0) -> None:
        inner = config.inner(stage, width_in)
        value = round(inner * config.value_ratio)
        super().__init__(config, stage, width_in, stride, value, drop)
        self.self_attn = HaloAttention(
            inner,
            value,
            stride=stride,
            num_heads=config.num_heads[stage],
            dim_head=config.dim_head,
            block_size=config.block_size,
            halo_size=config.halo_size,
            qk_ratio=config.qk_ratio / config.value_ratio,  # of the value width: rv leaves queries and keys as they are
            padding=config.padding,
            pad=config.pad,
        )
        self.post_attn = BatchNormAct2d(value, act_layer=cast(Any, config.act))

    def mix(self, x: Tensor) -> Tensor:
        return self.post_attn(self.self_attn(x))

    def mixing(self, side: int) -> int:
        return self.self_attn.complexity(side, side).multiply_adds


class ConvBottleneck(Bottleneck):
    """Residual block that mixes pixels by a 3x3 convolution and an optional channel gate."""

    def __init__(self, config: HaloNetConfig, stage: int, width_in: int, stride: int = 1, drop: float = 0.0) -> None:
        inner = config.inner(stage, width_in)
        super().__init__(config, stage, width_in, stride, inner, drop)
        groups = inner // config.conv_group if config.conv_group else 1
        self.conv2_kxk = _conv(config, inner, inner, 3, stride, groups)
        options = {"rd_ratio": config.gate_ratio} if config.gate == "se" else {}
        self.attn = create_attn(config.gate, inner, **options) or nn.Identity()

    def mix(self, x: Tensor) -> Tensor:
        return self.attn(self.conv2_kxk(x))

    def mixing(self, side: int) -> int:
        return _count(self.conv2_kxk, -(-side // self.stride))


BLOCKS = {"h": HaloBottleneck, "c": ConvBottleneck}


@provides("04-halonet")
class HaloNet(Backbone):
    """(B, in_chans, H, W) images to (B, num_classes) logits; `forward_intermediates` gives the maps of the stages."""

    Config = HaloNetConfig
    takes_any_size = True

    def __init__(self, config: HaloNetConfig) -> None:
        super().__init__(config)
        self.num_classes = config.num_classes
        self.num_features = config.num_features
        self.stem = _stem(config)
        self.feature_info = []
        width, reduction, stages = config.stem[-1], config.stem_stride, []
        rates = iter(torch.linspace(0, config.drop_path, sum(map(len, config.layout)), device="cpu").tolist())
        for stage, kinds in enumerate(config.layout):
            blocks = []
            for i, kind in enumerate(kinds):
                stride = config.strides[stage] if i == 0 else 1
                blocks.append(BLOCKS[kind](config, stage, width, stride, next(rates)))
                width = config.channels[stage]
            stages.append(nn.Sequential(*blocks))
            reduction *= config.strides[stage]
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": f"stages.{stage}"})
        self.stages = nn.Sequential(*stages)
        self.final_conv = _conv(config, width, config.final_width) if config.final_width else nn.Identity()
        self.head = self.classifier(config.num_classes)
        self.apply(_init)

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def finish(self, x: Tensor) -> Tensor:
        return self.final_conv(x)

    def multiply_adds(self, img_size: int | None = None) -> int:
        """Multiply-adds of convolutions, attention and head on a square image (default: the config's img_size)."""
        size = self.config.img_size if img_size is None else img_size
        total, side = self.num_features * self.num_classes, size
        for conv in (module for module in self.stem if isinstance(module, ConvNormAct)):
            side = -(-side // cast(nn.Conv2d, conv.conv).stride[0])
            total += _count(conv, side)
        side = -(-size // self.config.stem_stride)
        for block in (module for module in self.stages.modules() if isinstance(module, Bottleneck)):
            total += block.multiply_adds(side)
            side = -(-side // block.stride)
        return total + (_count(self.final_conv, side) if isinstance(self.final_conv, ConvNormAct) else 0)

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        """timm's names: its classifier is head.fc, and a stem of one convolution without a pool is that convolution."""
        for start, own in (("head.fc.", "head."), ("stem.conv.", "stem.conv1.conv."), ("stem.bn.", "stem.conv1.bn.")):
            if key.startswith(start):
                return own + key.removeprefix(start)
        return key


@provides("04-halonet")
def hybrid(name: str, layout: Sequence[str], **overrides: Any) -> HaloNet:
    """A registered HaloNet with other blocks: convolutions where images are large, attention where they are small.

    Args:
        name: a HaloNet, e.g. "halonet_h7".
        layout: per stage "h" (halo) or "c" (conv) for all its blocks, or one letter per block. The paper's hybrids of
            H7 are "chhh", "cchh" and "ccch".
        overrides: other fields of the config to change.

    Raises:
        ValueError: no such network, or a layout that does not fit its stages.
    """
    config = models.get(name).config
    if not isinstance(config, HaloNetConfig):
        raise ValueError(f"{name!r} is no HaloNet")
    if len(layout) != len(config.layout):
        raise ValueError(f"layout={layout!r} has {len(layout)} stages; {name} has {len(config.layout)}")
    blocks = tuple(
        kinds * len(old) if len(kinds) == 1 else kinds for kinds, old in zip(layout, config.layout, strict=True)
    )
    return cast(HaloNet, create_model(name, layout=blocks, **overrides))


def _conv(
    config: HaloNetConfig,
    width_in: int,
    width: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    act: bool = True,
) -> ConvNormAct:
    """Convolution without bias, batch norm, activation."""
    return ConvNormAct(width_in, width, kernel, stride, groups=groups, apply_act=act, act_layer=config.act)


def _count(conv: ConvNormAct, side: int) -> int:
    """Multiply-adds of a convolution whose output has side x side pixels."""
    return cast(nn.Conv2d, conv.conv).weight.numel() * side**2


def _stem(config: HaloNetConfig) -> nn.Sequential:
    stem = nn.Sequential()
    width, last = config.in_chans, len(config.stem) - 1
    for i, width_out in enumerate(config.stem):
        halves = (i == 0 and config.stem_stride > 1) or (i == last and config.stem_stride == 4 and not config.stem_pool)
        stem.add_module(f"conv{i + 1}", _conv(config, width, width_out, config.stem_kernel, 2 if halves else 1))
        width = width_out
    if config.stem_stride == 4 and config.stem_pool:
        stem.add_module("pool", nn.MaxPool2d(3, 2, padding=1))
    return stem


def _init(module: nn.Module) -> None:
    # `apply` visits children first, so the blocks and the attention have the last word on their parts.
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
    elif isinstance(module, HaloAttention):
        module.reset_parameters()
    elif isinstance(module, Bottleneck) and module.shortcut is not None:
        nn.init.zeros_(cast(Tensor, module.conv3_1x1.bn.weight))  # the block starts as its shortcut


def _paper(depth: int, block: int, halo: int, rv: float, rb: float, df: int, img_size: int) -> HaloNetConfig:
    """A row of the paper's table; `depth` is that of stage 3."""
    return HaloNetConfig(
        layout=("hhh", "hhh", "h" * depth, "hhh"),
        channels=tuple(round(m * rb) for m in (64, 128, 256, 512)),
        bottleneck=(1 / rb,) * 4,
        num_heads=(4, 8, 8, 8),
        block_size=block,
        halo_size=halo,
        value_ratio=rv,
        final_width=df,
        act="silu",
        img_size=img_size,
    )


register_models(
    HaloNet,
    # For images of 8 to 32 pixels: no stride in the stem, two stages.
    halonet_micro=HaloNetConfig(
        layout=("hhh", "hhh"),
        channels=(64, 128),
        bottleneck=(0.5, 0.5),
        num_heads=(2, 4),
        strides=(1, 2),
        block_size=4,
        halo_size=1,
        pad=True,
        stem=(32,),
        stem_kernel=3,
        stem_stride=1,
        stem_pool=False,
        act="silu",
        img_size=8,
        in_chans=1,
        num_classes=10,
    ),
    halonet_h0=_paper(7, 8, 3, 1.0, 0.5, 0, 256),
    halonet_h1=_paper(10, 8, 3, 1.0, 1.0, 0, 256),
    halonet_h2=_paper(11, 8, 3, 1.0, 1.25, 0, 256),
    halonet_h3=_paper(12, 10, 3, 1.0, 1.5, 1024, 320),
    halonet_h4=_paper(12, 12, 2, 1.0, 3.0, 1280, 384),
    halonet_h5=_paper(23, 14, 2, 2.5, 2.0, 1536, 448),
    halonet_h6=_paper(24, 8, 4, 3.0, 2.75, 1536, 512),
    # The paper's 600 pixels give maps that blocks of 10 do not divide; 640 do.
    halonet_h7=_paper(26, 10, 3, 4.0, 3.5, 2048, 640),
)

# timm's networks: its stem of three convolutions, four times wider outputs, attention in the later stages.
_TIERED = HaloNetConfig(
    layout=("cc", "cc", "ch", "hh"),
    channels=(256, 512, 1024, 2048),
    bottleneck=(0.25,) * 4,
    stem=(24, 32, 64),
    stem_kernel=3,
    act="silu",
)

register_models(
    HaloNet,
    halonet_timm_h1=dataclasses.replace(_paper(10, 8, 3, 1.0, 1.0, 0, 256), num_heads=(8, 8, 8, 8), act="relu"),
    halonet26t=dataclasses.replace(_TIERED, halo_size=2, act="relu"),
    sehalonet33ts=dataclasses.replace(
        _TIERED,
        layout=("cc", "cch", "cch", "hh"),
        channels=(256, 512, 1024, 1536),
        bottleneck=(0.25, 0.25, 0.25, 0.333),
        stem_pool=False,
        final_width=1280,
        gate="se",
    ),
    halonet50ts=dataclasses.replace(_TIERED, layout=("ccc", "ccch", "chchch", "chc"), num_heads=(8, 4, 8, 8)),
    eca_halonext26ts=dataclasses.replace(_TIERED, halo_size=2, dim_head=16, conv_group=16, gate="eca"),
    haloregnetz_b=HaloNetConfig(
        layout=("cc", "cccccc", "ccchccchccch", "hh"),
        channels=(48, 96, 192, 288),
        bottleneck=(3.0,) * 4,
        strides=(2, 2, 2, 2),
        block_size=7,
        halo_size=2,
        qk_ratio=0.33,
        stem=(32,),
        stem_kernel=3,
        stem_stride=2,
        stem_pool=False,
        final_width=1536,
        act="silu",
        conv_group=16,
        gate="se",
        gate_ratio=0.25,
        project_shortcut=False,
        expand_input=True,
        linear_out=True,
        img_size=224,
    ),
)
