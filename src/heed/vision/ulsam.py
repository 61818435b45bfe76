"""MobileNet-V1 and V2 with ULSAM (card 32), and ULSAM put after or in the place of layers of any other CNN.

    V1 layer:  x = pointwise(depthwise3x3(x))                               each with BN and ReLU6
    V2 layer:  x = x + project(depthwise3x3(expand(x)))                     x alone dropped where channels or stride differ
    replaced:  x = ULSAM(x)                                                 only layers that keep channels and size
    logits = head(mean(last(x)))                                            last: 1x1 convolution to 1280, V2 only

Saini et al., "ULSAM", WACV 2020, arXiv 2006.15102; Howard et al., "MobileNets", 2017, arXiv 1704.04861; Sandler et al.,
"MobileNetV2", CVPR 2018, arXiv 1801.04381. The authors released neither networks nor weights: which layers are replaced
is heed's reading, found by counting parameters and multiply-adds until they gave the paper's savings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from timm.layers import make_divisible
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation

from heed.catalogue import provides
from heed.errors import unknown
from heed.layers.ulsam import ULSAM
from heed.models import register_models
from heed.vision.backbone import Backbone

# Rows of (expansion, channels, layers, stride of the first); V1 has no expansion.
_STAGES = {
    1: ((1, 64, 1, 1), (1, 128, 2, 2), (1, 256, 2, 2), (1, 512, 6, 2), (1, 1024, 2, 2)),
    2: ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
}
_LAST = {1: 0, 2: 1280}


@provides("32-ulsam")
@dataclass(frozen=True)
class ULSAMNetConfig:
    """Settings of `ULSAMNet`; the defaults are MobileNet-V2 without ULSAM.

    Args:
        img_size: side in pixels that the published counts are for; the model takes images of any size.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        version: 1 for MobileNet-V1, 2 for V2.
        width: factor on all channels, rounded to multiples of 8.
        replaced: layers that ULSAM takes the place of, numbered as in torchvision's `features`: 0 is the first
            convolution, 1 the first bottleneck. The paper counts from 1, so its numbers are larger by 1.
        followed: layers that ULSAM comes after.
        groups: maps of attention in each ULSAM.
        momentum: of ULSAM's batch norms.
        stem_stride: of the first convolution; 1 suits images of 32 pixels.
        stages: rows of (expansion, channels, layers, stride) instead of the version's own.
        drop: dropout before the classifier.
    """

    img_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000
    version: int = 2
    width: float = 1.0
    replaced: tuple[int, ...] = ()
    followed: tuple[int, ...] = ()
    groups: int = 4
    momentum: float = 0.9
    stem_stride: int = 2
    stages: tuple[tuple[int, int, int, int], ...] | None = None
    drop: float = 0.2

    def __post_init__(self) -> None:
        if self.version not in _STAGES:
            raise ValueError(f"version={self.version} must be 1 or 2")
        if self.width <= 0:
            raise ValueError(f"width={self.width} must be positive")
        layers = sum(row[2] for row in self.rows)
        for place in (*self.replaced, *self.followed):
            if not 1 <= place <= layers:
                raise ValueError(f"layer {place} is not there to replace or follow; layers are 1 to {layers}")

    @property
    def rows(self) -> tuple[tuple[int, int, int, int], ...]:
        return self.stages or _STAGES[self.version]


@provides("32-ulsam")
class ULSAMNet(Backbone):
    """(B, in_chans, H, W) images of any size to (B, num_classes) logits; see the module for the equations.

    `features` is numbered as torchvision's; `load_authors` takes the weights of torchvision's mobilenet_v2 where no
    layer is replaced. `forward_intermediates` gives one map per resolution.
    """

    Config = ULSAMNetConfig
    takes_any_size = True

    def __init__(self, config: ULSAMNetConfig) -> None:
        super().__init__(config)
        channels = make_divisible(32 * config.width, 8)
        layers: list[nn.Module] = [_conv(config.in_chans, channels, 3, config.stem_stride)]
        reduction = config.stem_stride
        self.feature_info = []
        for expansion, wanted, count, first_stride in config.rows:
            out = make_divisible(wanted * config.width, 8)
            for i in range(count):
                stride = first_stride if i == 0 else 1
                if stride > 1:
                    self.feature_info.append(_info(channels, reduction, len(layers) - 1))
                    reduction *= stride
                layers.append(_layer(config, len(layers), channels, out, stride, expansion))
                channels = out
        self.feature_info.append(_info(channels, reduction, len(layers) - 1))
        self.ends = [int(info["module"].removeprefix("features.")) for info in self.feature_info]
        last = make_divisible(_LAST[config.version] * max(1.0, config.width), 8) if _LAST[config.version] else 0
        if last:
            layers.append(_conv(channels, last, 1))
        self.num_features = last or channels
        self.num_classes = config.num_classes
        self.features = nn.Sequential(*layers)
        self.drop = nn.Dropout(config.drop)
        self.head = self.classifier(config.num_classes)

    def classifier(self, num_classes: int) -> nn.Module:
        head = super().classifier(num_classes)
        if isinstance(head, nn.Linear):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        return head

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        if x.ndim != 4 or x.shape[1] != self.config.in_chans:
            raise ValueError(f"input {tuple(x.shape)}: this model takes images (B, {self.config.in_chans}, H, W)")
        maps = []
        for i, layer in enumerate(self.features[: self.ends[-1] + 1]):
            x = layer(x)
            if i in self.ends:
                maps.append(x)
        return maps

    def finish(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        return self.features[self.ends[-1] + 1 :](x)

    def forward_head(self, x: Float[Tensor, "B D H W"], pre_logits: bool = False) -> Tensor:
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.head(self.drop(pooled))

    def idle_parameters(self) -> list[str]:
        """Biases that batch norm takes away again while training."""
        return [
            f"{name}.{idle}"
            for name, module in self.named_modules()
            if isinstance(module, ULSAM)
            for idle in module.idle_parameters()
        ]

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        return re.sub(r"^classifier\.1\.", "head.", key)


def _conv(dim: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    layer = Conv2dNormActivation(dim, out, kernel, stride, groups=groups, activation_layer=nn.ReLU6)
    return layer.apply(_init_conv)


def _layer(config: ULSAMNetConfig, place: int, dim: int, out: int, stride: int, expansion: int) -> nn.Module:
    """One layer of the network, or the ULSAM in its place, or both."""
    if place in config.replaced:
        if stride != 1 or dim != out:
            raise ValueError(
                f"layer {place} turns {dim} into {out} channels with stride {stride}; ULSAM can only replace layers "
                "that keep channels and size"
            )
        return ULSAM(dim, config.groups, momentum=config.momentum)
    if config.version == 1:
        layer = nn.Sequential(_conv(dim, dim, 3, stride, dim), _conv(dim, out, 1))
    else:
        layer = InvertedResidual(dim, out, stride, expansion).apply(_init_conv)
    return (
        nn.Sequential(layer, ULSAM(out, config.groups, momentum=config.momentum)) if place in config.followed else layer
    )


def _init_conv(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")


def _info(channels: int, reduction: int, place: int) -> dict[str, object]:
    return {"num_chs": channels, "reduction": reduction, "module": f"features.{place}"}


@provides("32-ulsam")
@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-adds of convolutions and products for one image."""

    parameters: int
    multiply_adds: int


@provides("32-ulsam")
@dataclass(frozen=True)
class Swap:
    """What putting ULSAM into a model did to its costs."""

    before: Cost
    after: Cost

    def __str__(self) -> str:
        rows = []
        for name in ("parameters", "multiply_adds"):
            old, new = getattr(self.before, name), getattr(self.after, name)
            rows.append(f"{name.replace('_', '-')} {old:,} -> {new:,} ({new / old - 1:+.1%})")
        return "; ".join(rows)


@provides("32-ulsam")
def cost(model: nn.Module, image: tuple[int, int, int] = (3, 224, 224)) -> Cost:
    """Count a model's parameters and its multiply-adds on an image of (channels, height, width)."""
    scalings = 0  # ULSAM's first convolution runs as a product, which the counter does not see

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal scalings
        scalings += inputs[0][0].numel()

    hooks = [module.register_forward_pre_hook(see) for module in model.modules() if isinstance(module, ULSAM)]
    try:
        with FlopCounterMode(display=False) as counter:
            _dry_run(model, image)
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2 + scalings)


@provides("32-ulsam")
def replace_layers(
    model: nn.Module,
    paths: Sequence[str],
    groups: int = 4,
    image: tuple[int, int, int] = (3, 224, 224),
    momentum: float = 0.9,
) -> Swap:
    """Put ULSAM in the place of layers of a CNN, such as "blocks.4.1" of timm's mobilenetv2_100.

    The model is changed in place; before, it is run once on an image of zeros to see the shapes.

    Args:
        model: any model of images, (B, C, H, W) between the chosen layers.
        paths: names of the layers, as in `model.named_modules()`.
        groups: maps of attention in each.
        image: channels, height and width of the image.
        momentum: of ULSAM's batch norms.

    Raises:
        ValueError: a path that is not there or did not run, or a layer that changes channels or size.
    """
    shapes = _shapes(model, paths, image)
    for path, (before, after) in shapes.items():
        if before != after:
            raise ValueError(
                f"layer {path!r} turns {before} into {after} (channels, height, width); ULSAM can only replace layers "
                "that keep their shape"
            )
    return _swap(model, {path: after[0] for path, (_, after) in shapes.items()}, groups, image, momentum, keep=False)


@provides("32-ulsam")
def insert_after(
    model: nn.Module,
    paths: Sequence[str],
    groups: int = 4,
    image: tuple[int, int, int] = (3, 224, 224),
    momentum: float = 0.9,
) -> Swap:
    """Put ULSAM after layers of a CNN; a layer becomes Sequential(layer, ULSAM). Otherwise as `replace_layers`."""
    shapes = _shapes(model, paths, image)
    return _swap(model, {path: after[0] for path, (_, after) in shapes.items()}, groups, image, momentum, keep=True)


@provides("32-ulsam")
@torch.no_grad()
def attention_maps(model: nn.Module, images: Float[Tensor, "B C H W"]) -> dict[str, Tensor]:
    """The maps (B, g, h, w) of every ULSAM in a model, by name, for the model as it is (call `eval()` first)."""
    found: dict[str, Tensor] = {}

    def look(name: str, module: ULSAM) -> RemovableHandle:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = module.attention(inputs[0])

        return module.register_forward_pre_hook(keep)

    hooks = [look(name, module) for name, module in model.named_modules() if isinstance(module, ULSAM)]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _swap(
    model: nn.Module,
    channels: dict[str, int],
    groups: int,
    image: tuple[int, int, int],
    momentum: float,
    *,
    keep: bool,
) -> Swap:
    # Built first: groups that do not fit must not leave a model half changed.
    modules = {path: ULSAM(count, groups, momentum=momentum) for path, count in channels.items()}
    before = cost(model, image)
    for path, module in modules.items():
        layer = model.get_submodule(path)
        example = next(layer.parameters())
        module.to(example.device, example.dtype).train(layer.training)
        model.set_submodule(path, nn.Sequential(layer, module) if keep else module)
    return Swap(before, cost(model, image))


def _shapes(
    model: nn.Module, paths: Sequence[str], image: tuple[int, int, int]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """(channels, height, width) before and after each layer, from a run."""
    modules = dict(model.named_modules())
    for path in paths:
        if path not in modules or not path:
            raise ValueError(unknown("layer", path, (name for name in modules if name)))
    found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def look(path: str) -> RemovableHandle:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[path] = (tuple(inputs[0].shape[1:]), tuple(output.shape[1:]))

        return modules[path].register_forward_hook(keep)

    hooks = [look(path) for path in paths]
    try:
        _dry_run(model, image)
    finally:
        for hook in hooks:
            hook.remove()
    for path in paths:
        if len(found.get(path, ((), ()))[1]) != 3:
            raise ValueError(f"layer {path!r} gives no map (B, C, H, W) when the model runs on an image of {image}")
    return found


@torch.no_grad()
def _dry_run(model: nn.Module, image: tuple[int, int, int]) -> None:
    """Run on zeros, without leaving a trace in batch norms."""
    training = {module: module.training for module in model.modules()}
    example = next(model.parameters())
    try:
        model.eval()
        model(torch.zeros(1, *image, device=example.device, dtype=example.dtype))
    finally:
        for module, was in training.items():
            module.training = was


_V1 = ULSAMNetConfig(version=1)
_V2 = ULSAMNetConfig()

register_models(
    ULSAMNet,
    # For images of 8 to 32 pixels a side: two resolutions, ULSAM in the place of one layer of each.
    ulsam_micro=ULSAMNetConfig(
        img_size=8,
        in_chans=1,
        num_classes=10,
        replaced=(3, 6),
        stem_stride=1,
        stages=((1, 32, 1, 1), (2, 32, 3, 1), (2, 64, 3, 2)),
        drop=0.0,
    ),
    mobilenet_v1=_V1,
    mobilenet_v2=_V2,
    # The last of five equal layers of 512 channels could as well be another of them.
    mobilenet_v1_ulsam=replace(_V1, replaced=(11,)),
    # Named by the replaced layers. The first is the abstract's 13 % on ImageNet, the second its 25 % on fine-grained data.
    mobilenet_v2_ulsam_13_16=replace(_V2, replaced=(13, 16)),
    mobilenet_v2_ulsam_12_13_15_16=replace(_V2, replaced=(12, 13, 15, 16)),
    mobilenet_v2_ulsam_13=replace(_V2, replaced=(13,)),
    mobilenet_v2_ulsam_16=replace(_V2, replaced=(16,)),
    mobilenet_v2_ulsam_12_13_16=replace(_V2, replaced=(12, 13, 16)),
)
