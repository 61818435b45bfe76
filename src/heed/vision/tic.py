"""TiC (card 52): a classifier made of MSA-Conv layers, for images of any size. All of it is heed's reconstruction.

    x = conv(image)                                  (B, C, H/4, W/4), kernel and stride 4
    x = x + MSAConv(BN(x))                           (B, C, h, w), layer after layer; see `heed.layers.tic`
    x = W mean_2x2(x) + MSAConv(BN(x))               (B, 2C, h/2, w/2), the first layer of stages 2, 3 and 4
    logits = head(mean of BN(x))

The halving layers halve by the stride of their output convolution. The others work on maps that are cyclically shifted,
each in another direction (MDCSM), and every second layer of a stage attends to averages of 2 x 2 pixels (IPM).

Zhang, Wang, Bian, Xiong, "TiC: Exploring Vision Transformer in Convolution", arXiv 2310.04134, whose authors released the
MSA-Conv layer and nothing else. The order of parts, depths, widths and heads are heed's, after the abstract; BatchNorm
and the shortcuts, too: without both, networks of twelve layers did not learn. Neither the paper's figures nor weights of
its networks belong to these models.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.tic import IPM, MDCSM, MSAConv2d
from heed.models import register_models
from heed.vision.backbone import Backbone
from heed.vision.parts import check_norm_batch, pad_to_multiple, pyramid_info


@provides("52-tic")
@dataclass(frozen=True)
class TiCConfig:
    """Settings of `TiC`; settings per stage have one entry per stage. The defaults are heed's tiny.

    Args:
        img_size: side in pixels of the images the configuration is meant for; others work too.
        patch_size: pixels per position of the first map and axis.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dims: channels per stage.
        depths: MSA-Conv layers per stage, at least 1.
        heads: per stage; must divide the channels that the stage's layers attend with.
        kernel_size: odd side of attention windows and output convolutions.
        dilation: of attention windows.
        pad_mode: what lies beyond the map, see `heed.layers.tic.msa_conv`.
        attn_drop: dropout of attention weights.
        shift: pixels of the cyclic shift (MDCSM), None for kernel_size // 2, 0 to go without.
        diagonals: let the shift take the four diagonal directions, too.
        inter_pooling: attend to pooled keys in every second layer of a stage (IPM).
    """

    img_size: int = 224
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000
    dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (2, 4, 8, 16)
    kernel_size: int = 3
    dilation: int = 1
    pad_mode: str = "zeros"
    attn_drop: float = 0.1
    shift: int | None = None
    diagonals: bool = False
    inter_pooling: bool = True

    def __post_init__(self) -> None:
        if not len(self.dims) == len(self.depths) == len(self.heads) > 0:
            raise ValueError(f"dims={self.dims}, depths={self.depths} and heads={self.heads} need one entry per stage")
        if min(self.depths) < 1:
            raise ValueError(f"depths={self.depths}: every stage needs a layer")
        if self.patch_size < 1:
            raise ValueError(f"patch_size={self.patch_size} must be at least 1 pixel")


class Block(nn.Module):
    """BatchNorm, a layer, and the input added: (B, dim, H, W) -> (B, out_dim, ceil(H / stride), ceil(W / stride)).

    Args:
        dim, out_dim, stride: what the layer does to the map; the shortcut does the same where that is anything.
        layer: usually an `MSAConv2d`.
    """

    def __init__(self, dim: int, out_dim: int, stride: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.layer = layer
        self.shortcut = nn.Sequential()
        if stride > 1 or dim != out_dim:
            self.shortcut.append(nn.AvgPool2d(stride, ceil_mode=True)).append(nn.Conv2d(dim, out_dim, 1))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return self.shortcut(x) + self.layer(self.norm(x))


@provides("52-tic")
class TiC(Backbone):
    """(B, in_chans, H, W) images of any size to (B, num_classes) logits; see the module for the equations.

    `forward_intermediates` gives the pyramid for dense prediction: the maps of the stages, at strides 4, 8, 16, 32.
    Without cyclic shift and inter-pooling (shift=0, inter_pooling=False) the maps of an image, away from its borders, are
    those of the image's crops. `load_authors` has no names to translate: no weights of such a network were released.
    """

    Config = TiCConfig
    takes_any_size = True

    def __init__(self, config: TiCConfig) -> None:
        super().__init__(config)
        c = config
        self.num_classes = c.num_classes
        self.num_features = c.dims[-1]
        self.feature_info = pyramid_info(c.dims, c.patch_size, "stages.{}")
        self.stem = nn.Conv2d(c.in_chans, c.dims[0], c.patch_size, c.patch_size)
        size = c.kernel_size // 2 if c.shift is None else c.shift
        directions = itertools.cycle(MDCSM.directions(size, c.diagonals))
        stages, width = [], c.dims[0]
        for i, dim in enumerate(c.dims):
            blocks = []
            for j in range(c.depths[i]):
                stride = 2 if i and not j else 1
                kind = IPM if c.inter_pooling and j % 2 else MSAConv2d
                layer: nn.Module = kind(
                    width,
                    dim,
                    c.kernel_size,
                    stride,
                    c.dilation,
                    c.attn_drop,
                    "same",
                    heads=c.heads[i],
                    pad_mode=c.pad_mode,
                )
                if size and stride == 1:
                    layer = MDCSM(layer, next(directions))
                blocks.append(Block(width, dim, stride, layer))
                width = dim
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.BatchNorm2d(width)
        self.head = self.classifier(c.num_classes)

    def check_images(self, x: Tensor) -> None:
        super().check_images(x)
        if self.training:
            check_norm_batch(x, self.feature_info[-1]["reduction"])

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        x = self.stem(pad_to_multiple(x, self.config.patch_size))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def finish(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return self.norm(x)


@provides("52-tic")
@torch.no_grad()
def logits_at_sizes(
    model: Backbone, images: Float[Tensor, "B C H W"], sizes: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Tensor]:
    """What one set of weights says of the same images at several sizes, by size: (B, num_classes) logits.

    Args:
        model: a backbone that takes any size, in the mode (train or eval) it is in.
        images: (B, C, H, W).
        sizes: (height, width) in pixels; images are resized bilinearly, with antialiasing.

    Raises:
        ValueError: a model that takes one size only.
    """
    if not model.takes_any_size:
        raise ValueError(
            f"{type(model).__name__} takes images of {model.config.img_size} pixels only, not several sizes"
        )
    return {
        (height, width): model(F.interpolate(images, size=(height, width), mode="bilinear", antialias=True))
        for height, width in sizes
    }


@provides("52-tic")
def receptive_field(
    network: Callable[[Tensor], Tensor], images: Float[Tensor, "B C H W"], at: tuple[int, int]
) -> Float[Tensor, "H W"]:
    """How much each pixel moves one position of the output map: |d output / d pixel|, summed over channels, mean of images.

    Args:
        network: maps (B, C, H, W) to maps (B, D, h, w).
        images: where the gradient is taken; random ones will do.
        at: row and column of the output map, negative ones counted from its end.
    """
    images = images.detach().requires_grad_()
    row, column = at
    (gradient,) = torch.autograd.grad(network(images)[:, :, row, column].sum(), images)
    return gradient.abs().sum(1).mean(0)


_TINY = TiCConfig()

register_models(
    TiC,
    # For images of 8 to 32 pixels: about the size of `vit_micro`, two stages.
    tic_micro=TiCConfig(
        img_size=8,
        patch_size=1,
        in_chans=1,
        num_classes=10,
        dims=(32, 64),
        depths=(2, 2),
        heads=(4, 8),
        attn_drop=0.0,
    ),
    tic_tiny=_TINY,
    tic_small=replace(_TINY, depths=(2, 2, 18, 2)),
)
