"""FFNet (card 53): four stages of depthwise convolutions in two residuals, which fuse into a plain convolutional network.

    x = ConvBN_s2(GELU(ConvBN_s2(image)))                  (B, C, H/4, W/4), later halved: x = z + W BN(z), z = DW7_s2(x)
    x = x + s_1 * DW_v(GELU(DW_k(W_q x)))                  depth times: FFNified attention, `heed.layers.metamixer`
    x = x + s_2 * (W_2 GELU(W_1 DW(x)))                    channel mixer
    logits = head(mean of BN(x))

A depthwise kernel of 7 is a 7 x 7 and a 3 x 3 with BatchNorm each while training. Norms sit inside the residuals; s_1 and
s_2, learned per channel, exist in FFNet-3 and FFNet-4 alone. Dense prediction: heed.vision.ffnet_seg. Not to be confused
with Qualcomm's FFNet for segmentation.

Yun, Lee, Ro, "MetaMixer Is All You Need" (later "FFNet: MetaMixer-based Efficient Convolutional Mixer Design"), 2024,
arXiv 2406.02021.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath, LayerNorm2d, LayerScale2d, SqueezeExcite, trunc_normal_
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.layers.metamixer import FFNifiedAttention, SoftmaxMixer, rep_depthwise
from heed.layers.reparam import ConvNorm, Fusable, convolution_like, fuse, norm_as_affine
from heed.models import register_models
from heed.vision.backbone import Backbone
from heed.vision.parts import drop_path_rates, pyramid_info

MIXERS = ("ffnified", "softmax", "identity")
_PER_STAGE = ("depths", "channel_kernels", "key_kernels", "value_kernels", "mlp_ratios", "mixers")
_HEAD_DIM = 32


@provides("53-metamixer")
@dataclass(frozen=True)
class FFNetConfig:
    """Settings of `FFNet`; tuples have one entry per stage. The defaults are FFNet-1.

    Args:
        img_size: side in pixels of the images the configuration is meant for; others work too.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        stem_dim: channels between the two convolutions of the stem.
        stem_strides: steps of these two in pixels.
        dims: channels; each a multiple of the one before.
        depths: blocks.
        channel_kernels: sides of the depthwise kernels in the channel mixers; odd, as the next two.
        key_kernels, value_kernels: sides of the depthwise kernels in the token mixers.
        mlp_ratios: hidden width of the channel mixers over the channels.
        layer_scale: initial factor on both residuals, None for none.
        squeeze_excite: SqueezeExcite between the residuals of every other block; no published model has it.
        layer_norm: LayerNorm instead of BatchNorm before pooling.
        dense: for dense prediction: a LayerNorm on each stage's map, none before pooling. The next stage goes on from
            the map without it.
        mixers: token mixers, "ffnified", or for comparisons "softmax" (attention between all pixels, after BatchNorm, in
            heads of 32 channels) and "identity". The authors published no code for these: they are heed's reading.
        drop_path: stochastic depth of the last block, linear from 0.
        fused: built as what `FFNet.fuse` leaves.
    """

    img_size: int = 256
    in_chans: int = 3
    num_classes: int = 1000
    stem_dim: int = 64
    stem_strides: tuple[int, int] = (2, 2)
    dims: tuple[int, ...] = (80, 160, 320, 640)
    depths: tuple[int, ...] = (2, 2, 8, 2)
    channel_kernels: tuple[int, ...] = (3, 3, 3, 3)
    key_kernels: tuple[int, ...] = (3, 3, 7, 7)
    value_kernels: tuple[int, ...] = (3, 3, 7, 7)
    mlp_ratios: tuple[float, ...] = (3, 3, 3, 3)
    layer_scale: float | None = None
    squeeze_excite: bool = False
    layer_norm: bool = False
    dense: bool = False
    mixers: tuple[str, ...] = ("ffnified",) * 4
    drop_path: float = 0.1
    fused: bool = False

    def __post_init__(self) -> None:
        check_stages(self, _PER_STAGE)
        for stage, (before, dim) in enumerate(zip(self.dims, self.dims[1:], strict=False), 2):
            if dim % before:
                raise ValueError(f"dims={self.dims}: the {dim} channels of stage {stage} are no multiple of {before}")
        for mixer in self.mixers:
            if mixer not in MIXERS:
                raise ValueError(unknown("mixer", mixer, MIXERS))


def check_stages(config: Any, names: tuple[str, ...]) -> None:
    """Raise ValueError for settings without one entry per stage, and for even kernels."""
    count = len(config.dims)
    for name in names:
        values = getattr(config, name)
        if len(values) != count:
            missing = f"stage {len(values) + 1} has none" if len(values) < count else f"there is no stage {count + 1}"
            raise ValueError(f"{name}={values} needs {count} entries, one for each of dims={config.dims}; {missing}")
        for stage, value in enumerate(values, 1):
            if name.endswith("kernels") and value % 2 == 0:
                raise ValueError(
                    f"{name}={values}: the kernel of stage {stage} is even and has no middle; use an odd one"
                )


class Residual(nn.Module):
    """x + scale * main(x), skipped at random while training; with `activate`, GELU of it: (B, dim, H, W) -> same."""

    def __init__(
        self,
        main: nn.Module,
        dim: int,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        *,
        activate: bool = False,
    ) -> None:
        super().__init__()
        self.main = main
        self.scale = nn.Identity() if layer_scale is None else LayerScale2d(dim, layer_scale)
        self.drop_path = DropPath(drop_path)
        self.activate = activate

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        x = x + self.drop_path(self.scale(self.main(x)))
        return F.gelu(x) if self.activate else x


@provides("53-metamixer")
class ChannelMixer(nn.Module):
    """Depthwise convolution with BatchNorm, 1 x 1, GELU, 1 x 1: (B, dim, H, W) -> (B, dim, H, W).

    Args:
        dim: channels C.
        ratio: channels in between over C.
        conv: the depthwise convolution, usually with BatchNorm.
    """

    def __init__(self, dim: int, ratio: float, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.fc1 = nn.Conv2d(dim, int(ratio * dim), 1)
        self.fc2 = nn.Conv2d(int(ratio * dim), dim, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


@provides("53-metamixer")
class FFBlock(nn.Module):
    """A token mixer and a channel mixer, each in a residual: (B, dim, H, W) -> (B, dim, H, W).

    Args:
        dim: channels C.
        token: the token mixer, such as `FFNifiedAttention`.
        channel: the channel mixer.
        layer_scale: initial factor on both, None for none.
        drop_path: probability of skipping either while training, per image.
        squeeze_excite: SqueezeExcite (a quarter of the channels) between the two.
        activate: GELU after either sum, as in the segmentation head.
    """

    def __init__(
        self,
        dim: int,
        token: nn.Module,
        channel: nn.Module,
        *,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        squeeze_excite: bool = False,
        activate: bool = False,
    ) -> None:
        super().__init__()
        self.token = Residual(token, dim, layer_scale, drop_path, activate=activate)
        self.se = SqueezeExcite(dim, 0.25) if squeeze_excite else nn.Identity()
        self.channel = Residual(channel, dim, layer_scale, drop_path, activate=activate)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return self.channel(self.se(self.token(x)))


class NormedSkip(Fusable):
    """y + W BN(y), W of 1 x 1: (B, dim, H, W) -> (B, dim, H, W). Fused into one 1 x 1 convolution with W' = W s + I."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, y: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return y + self.conv(self.norm(y))

    @torch.no_grad()
    def fused(self) -> nn.Module:
        scale, shift = norm_as_affine(self.norm)
        matrix = self.conv.weight[:, :, 0, 0]
        weight = matrix * scale + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return convolution_like(self.conv, weight[:, :, None, None], matrix @ shift)


class PatchMerging(nn.Sequential):
    """Halve the sides, rounding up: (B, in_dim, H, W) -> (B, dim, H/2, W/2); dim is a multiple of in_dim."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(rep_depthwise(in_dim, dim, 7, stride=2), NormedSkip(dim))


def channel_conv(dim: int, kernel: int) -> nn.Module:
    """The depthwise convolution of the channel mixers: other than in the token mixers, 3 x 3 has BatchNorm too."""
    return rep_depthwise(dim, dim, kernel) if kernel == 7 else ConvNorm(dim, dim, kernel, groups=dim)


# The authors' names and ours, in the order in which they are replaced.
AUTHORS_PREFIXES = r"^(module\.)?(encoder\.|backbone\.)?"
BLOCK_RENAMES = (
    (r"\btoken_mixer\.(0\.)?main\.fc\.", "token.main.query."),
    (r"\btoken_mixer\.(0\.)?main\.conv1\.", "token.main.interaction.operation."),
    (r"\btoken_mixer\.(0\.)?main\.conv2\.", "token.main.aggregation.operation."),
    (r"\btoken_mixer\.0\.layer_scale$", "token.scale.gamma"),
    (r"\btoken_mixer\.1\.", "se."),
    (r"\bchannel_mixer\.main\.", "channel.main."),
    (r"\bchannel_mixer\.layer_scale$", "channel.scale.gamma"),
)
NORM_RENAMES = ((r"\.c\.(?=\w+$)", ".conv."), (r"\.bn\.(?=\w+$)", ".norm."))
_RENAMES = (
    (AUTHORS_PREFIXES, ""),
    *BLOCK_RENAMES,
    (r"^patch_embed\.", "stem."),
    (r"^norm(\d)\.", r"norms.\1."),
    (r"\.proj\.1\.conv\.", ".1."),
    (r"\.proj\.(\d)\.", r".\1."),
    (r"\.(operation|main\.conv|\d)\.conv\.(c|bn)\.", r".\1.branches.large.\2."),
    (r"\.(operation|main\.conv|\d)\.conv1\.(c|bn)\.", r".\1.branches.small.\2."),
    *NORM_RENAMES,
)
# What surrounds the backbone in detection and segmentation checkpoints.
_TASK_PARTS = ("neck.", "rpn_head.", "roi_head.", "bbox_head.", "decode_head.", "auxiliary_head.")


@provides("53-metamixer")
class FFNet(Backbone):
    """(B, in_chans, H, W) images of any size to (B, num_classes) logits; see the module for the equations.

    `fuse` turns a trained model into plain convolutions. `forward_intermediates` gives the maps of the stages, with
    dense=True after the LayerNorms of the authors' backbones for UPerNet and Mask R-CNN. Their SyncBatchNorm is
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).
    """

    Config = FFNetConfig
    takes_any_size = True

    def __init__(self, config: FFNetConfig) -> None:
        super().__init__(config)
        c = config
        self.num_classes = c.num_classes
        self.num_features = c.dims[-1]
        first, second = c.stem_strides
        self.feature_info = pyramid_info(c.dims, first * second, "norms.{}" if c.dense else "stages.{}")
        self.stem = nn.Sequential(
            ConvNorm(c.in_chans, c.stem_dim, 3, first), nn.GELU(), ConvNorm(c.stem_dim, c.dims[0], 3, second)
        )
        rates = drop_path_rates(c.drop_path, c.depths)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(c.dims):
            merging = [PatchMerging(c.dims[i - 1], dim)] if i else []
            blocks = (_block(c, i, rate, even=j % 2 == 0) for j, rate in enumerate(rates[i]))
            self.stages.append(nn.Sequential(*merging, *blocks))
        if c.dense:
            self.norms = nn.ModuleList(LayerNorm2d(dim) for dim in c.dims)
        else:
            self.norm = LayerNorm2d(c.dims[-1]) if c.layer_norm else nn.BatchNorm2d(c.dims[-1])
        self.head = self.classifier(c.num_classes)
        self.apply(init_weights)
        if c.fused:
            fuse(self.eval()).train()

    def classifier(self, num_classes: int) -> nn.Module:
        head = super().classifier(num_classes)
        init_weights(head)
        return head

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            maps.append(self.norms[i](x) if self.config.dense else x)
        return maps

    def finish(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x if self.config.dense else self.norm(x)

    def fuse(self) -> Self:
        """Fold every BatchNorm and every second branch into the convolutions, in place: same function, fewer parameters.

        The names of the weights change with it; `save_pretrained` keeps the fused model. Training can go on, without
        BatchNorm.

        Raises:
            RuntimeError: the model is in training mode.
        """
        fuse(self)
        self.config = dataclasses.replace(self.config, fused=True)
        return self

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        key = re.sub(AUTHORS_PREFIXES, "", key)
        if key.startswith(_TASK_PARTS):
            return None
        for theirs, ours in _RENAMES:
            key = re.sub(theirs, ours, key)
        return key

    def load_authors(self, weights: dict[str, Tensor], source: str = "the authors' weights") -> Self:
        """Load a state dict that uses the authors' names.

        With dense=True a classifier's weights will do: its last norm and its classifier are left out, and the LayerNorms
        keep their values if the weights have none.
        """
        weights = {key: flat_scale(key, value) for key, value in weights.items()}
        if self.config.dense:
            ends = {key: value for key, value in self.state_dict().items() if key.startswith(("norms.", "head."))}
            renamed = {self.authors_key(key): value for key, value in weights.items()}
            weights = ends | {k: v for k, v in renamed.items() if k and not k.startswith(("norm.", "head."))}
        return super().load_authors(weights, source)


def flat_scale(key: str, value: Tensor) -> Tensor:
    """The authors' layer scale is (C, 1, 1), ours (C,)."""
    return value.flatten() if key.endswith(".layer_scale") else value


def init_weights(module: nn.Module) -> None:
    """For `model.apply`: convolutions and linear layers truncated normal with deviation 0.02, biases 0."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _block(config: FFNetConfig, stage: int, drop_path: float, *, even: bool) -> FFBlock:
    c, dim = config, config.dims[stage]
    return FFBlock(
        dim,
        _token_mixer(c, stage),
        ChannelMixer(dim, c.mlp_ratios[stage], channel_conv(dim, c.channel_kernels[stage])),
        layer_scale=c.layer_scale,
        drop_path=drop_path,
        squeeze_excite=c.squeeze_excite and even,
    )


def _token_mixer(config: FFNetConfig, stage: int) -> nn.Module:
    dim, mixer = config.dims[stage], config.mixers[stage]
    if mixer == "ffnified":
        return FFNifiedAttention(dim, config.key_kernels[stage], config.value_kernels[stage])
    if mixer == "softmax":
        return nn.Sequential(nn.BatchNorm2d(dim), SoftmaxMixer(dim, max(dim // _HEAD_DIM, 1)))
    return nn.Identity()


_FFNET_1 = FFNetConfig()
_FFNET_2 = replace(
    _FFNET_1, dims=(88, 176, 352, 704), depths=(3, 3, 15, 3), channel_kernels=(7, 7, 7, 7), drop_path=0.15
)
_FFNET_3 = replace(_FFNET_2, dims=(96, 192, 384, 768), depths=(4, 4, 22, 5), layer_scale=1e-6, drop_path=0.35)

register_models(
    FFNet,
    # For images of 8 to 32 pixels: the size of `vit_micro`, two stages, kernels of FFNet's first and last ones.
    ffnet_micro=FFNetConfig(
        img_size=8,
        in_chans=1,
        num_classes=10,
        stem_dim=32,
        stem_strides=(1, 1),
        dims=(32, 64),
        depths=(2, 4),
        channel_kernels=(3, 3),
        key_kernels=(3, 7),
        value_kernels=(3, 7),
        mlp_ratios=(2, 2),
        mixers=("ffnified",) * 2,
        drop_path=0.0,
    ),
    ffnet_1=_FFNET_1,
    ffnet_2=_FFNET_2,
    ffnet_3=_FFNET_3,
    ffnet_4=replace(_FFNET_3, img_size=384, dims=(128, 256, 512, 1024), depths=(4, 4, 27, 3), drop_path=0.5),
)
