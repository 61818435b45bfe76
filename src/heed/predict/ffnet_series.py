"""FFNet for forecasting (card 53): every variable of a series is cut into patches, mixed by long 1-D kernels, and read off.

    x = (x - mean) / std                     per series, over its L steps (RevIN)                (B, L, M)
    z = BN(conv(x))                          per variable, patches of P steps, stride S          (B, M, D, N), N = L / S
    q = W_2 GELU(W_1 z)                      W_1 mixes the M variables of a channel, W_2 the channels of a variable
    z = z + DW_v(GELU(DW_k(BN(q))))          FFNified attention, a kernel of 51 patches per variable and channel
    z = z + V_2 GELU(V_1 BN(DW(z)))          V_1 mixes the channels of a variable, V_2 the variables of a channel
    y = W vec(z), times std plus mean        W (horizon x D N) is shared by the variables        (B, horizon, M)

Yun, Lee, Ro, "MetaMixer Is All You Need", 2024, arXiv 2406.02021. The structure, less the order of the steps, is
ModernTCN's (Luo, Wang, ICLR 2024). Shorter maps for further stages, of which no published model has any, follow
ModernTCN: this is heed's own reading.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.metamixer import FFNifiedAttention, plain_depthwise, rep_depthwise
from heed.layers.reparam import fuse
from heed.models import HeedModel, register_models

# Dropout that the authors fix: after the two steps of the query, and at the end of the channel mixer.
_QUERY_DROPS = (0.3, 0.15)
_CHANNEL_DROP = 0.15


@provides("53-metamixer")
@dataclass(frozen=True)
class FFNetSeriesConfig:
    """Settings of `FFNetSeries`; dims, depths, kernels and small_kernels have one entry per stage.

    Args:
        length: steps L of the past; a multiple of stride.
        horizon: steps to forecast.
        variables: M.
        patch: steps P per patch.
        stride: steps S from patch to patch, at most patch; the last step is repeated where patches reach beyond it.
        dims: channels D per variable.
        depths: blocks.
        kernels: sides of the depthwise kernels, in patches; odd.
        small_kernels: sides of the second branch in the channel mixers; odd.
        ratio: hidden width of the channel mixers over the channels.
        drop: dropout in the middle of the channel mixers.
        head_drop: dropout on the forecast.
        downsample: patches that become one from stage to stage.
        normalise: RevIN around the network.
        affine: learned factor and offset per variable in RevIN.
        subtract_last: RevIN centres on the last step instead of the mean.
        fused: built as what `FFNetSeries.fuse` leaves.
    """

    length: int = 96
    horizon: int = 96
    variables: int = 7
    patch: int = 4
    stride: int = 2
    dims: tuple[int, ...] = (64,)
    depths: tuple[int, ...] = (1,)
    kernels: tuple[int, ...] = (51,)
    small_kernels: tuple[int, ...] = (5,)
    ratio: int = 2
    drop: float = 0.6
    head_drop: float = 0.0
    downsample: int = 2
    normalise: bool = True
    affine: bool = False
    subtract_last: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        for name in ("depths", "kernels", "small_kernels"):
            if len(getattr(self, name)) != len(self.dims):
                raise ValueError(f"{name}={getattr(self, name)} needs one entry for each of dims={self.dims}")
        if not 1 <= self.stride <= self.patch:
            raise ValueError(f"stride={self.stride} must be from 1 to patch={self.patch} steps")
        if self.length < self.patch:
            raise ValueError(f"length={self.length} is shorter than a patch; at least {self.patch} steps are needed")
        if self.length % self.stride:
            fitting = self.length - self.length % self.stride
            raise ValueError(
                f"length={self.length} is no multiple of stride={self.stride}; {fitting} or "
                f"{fitting + self.stride} steps would do"
            )

    @property
    def patches(self) -> int:
        """N after the last stage."""
        count = self.length // self.stride
        for _ in self.dims[1:]:
            count = -(-count // self.downsample)
        return count


@provides("53-metamixer")
class RevIN(nn.Module):
    """Reversible instance normalisation of series (B, L, M) (Kim et al., ICLR 2022).

    Args:
        variables: M.
        affine: learned factor and offset per variable.
        subtract_last: centre on the last step instead of the mean.
    """

    eps = 1e-5

    def __init__(self, variables: int, *, affine: bool = False, subtract_last: bool = False) -> None:
        super().__init__()
        self.subtract_last = subtract_last
        self.weight = nn.Parameter(torch.ones(variables)) if affine else None
        self.bias = nn.Parameter(torch.zeros(variables)) if affine else None

    def statistics(self, x: Float[Tensor, "B L M"]) -> tuple[Float[Tensor, "B 1 M"], Float[Tensor, "B 1 M"]]:
        """Centre and spread, without gradient."""
        x = x.detach()
        centre = x[:, -1:] if self.subtract_last else x.mean(1, keepdim=True)
        return centre, (x.var(1, keepdim=True, unbiased=False) + self.eps).sqrt()

    def forward(
        self, x: Float[Tensor, "B L M"], centre: Float[Tensor, "B 1 M"], spread: Float[Tensor, "B 1 M"]
    ) -> Float[Tensor, "B L M"]:
        x = (x - centre) / spread
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias

    def inverse(
        self, y: Float[Tensor, "B L M"], centre: Float[Tensor, "B 1 M"], spread: Float[Tensor, "B 1 M"]
    ) -> Float[Tensor, "B L M"]:
        if self.weight is not None and self.bias is not None:
            y = (y - self.bias) / (self.weight + self.eps**2)
        return y * spread + centre


class VariableQuery(nn.Module):
    """GELU between a mix of variables and a mix of channels, then BatchNorm: (B, M D, N) -> (B, M D, N)."""

    def __init__(self, variables: int, dim: int) -> None:
        super().__init__()
        self.sizes = (variables, dim)
        self.across = nn.Conv1d(dim * variables, dim * 2 * variables, 1, groups=dim)
        self.within = nn.Conv1d(2 * variables * dim, variables * dim, 1, groups=variables)
        self.drops = nn.ModuleList(nn.Dropout(rate) for rate in _QUERY_DROPS)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, z: Float[Tensor, "B MD N"]) -> Float[Tensor, "B MD N"]:
        variables, dim = self.sizes
        z = nn.functional.gelu(self.drops[0](self.across(_swap(z, variables, dim))))
        z = self.drops[1](self.within(_swap(z, dim, 2 * variables)))
        return _norm(self.norm, z)


class SeriesChannelMixer(nn.Module):
    """Depthwise kernels, a mix of channels, GELU, a mix of variables: (B, M D, N) -> (B, M D, N)."""

    def __init__(self, variables: int, dim: int, kernel: int, small: int, ratio: int, drop: float) -> None:
        super().__init__()
        width = variables * dim
        self.sizes = (variables, ratio * dim, dim)
        self.conv = rep_depthwise(width, width, kernel, small, ndim=1)
        self.norm = nn.BatchNorm1d(dim)
        self.within = nn.Conv1d(width, ratio * width, 1, groups=variables)
        self.across = nn.Conv1d(ratio * width, width, 1, groups=dim)
        self.drops = nn.ModuleList(nn.Dropout(rate) for rate in (drop, _CHANNEL_DROP))

    def forward(self, z: Float[Tensor, "B MD N"]) -> Float[Tensor, "B MD N"]:
        variables, hidden, dim = self.sizes
        z = nn.functional.gelu(self.drops[0](self.within(_norm(self.norm, self.conv(z)))))
        z = self.drops[1](self.across(_swap(z, variables, hidden)))
        return _swap(z, dim, variables)


class SeriesBlock(nn.Module):
    """Token mixer and channel mixer, each in a residual: (B, M D, N) -> (B, M D, N)."""

    def __init__(self, config: FFNetSeriesConfig, stage: int) -> None:
        super().__init__()
        c, dim, kernel = config, config.dims[stage], config.kernels[stage]
        query = VariableQuery(c.variables, dim)
        self.token = FFNifiedAttention(
            c.variables * dim, kernel, kernel, ndim=1, query=query, depthwise=plain_depthwise
        )
        self.channel = SeriesChannelMixer(c.variables, dim, kernel, c.small_kernels[stage], c.ratio, c.drop)

    def forward(self, z: Float[Tensor, "B MD N"]) -> Float[Tensor, "B MD N"]:
        z = z + self.token(z)
        return z + self.channel(z)


# The authors' names and ours. They also store layers that no forward pass uses.
_RENAMES = (
    (r"^module\.", ""),
    (r"^model\.", ""),
    (r"^revin_layer\.affine_", "revin."),
    (r"^downsample_layers\.0\.0\.", "stem.conv."),
    (r"^downsample_layers\.0\.1\.", "stem.norm."),
    (r"^downsample_layers\.(\d+)\.0\.", r"merging.\1.norm."),
    (r"^downsample_layers\.(\d+)\.1\.", r"merging.\1.conv."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"\.token_mixer\.ffnpw1\.", ".token.query.across."),
    (r"\.token_mixer\.ffnpw2\.", ".token.query.within."),
    (r"\.token_mixer\.norm\.", ".token.query.norm."),
    (r"\.token_mixer\.dw1\.", ".token.interaction.operation."),
    (r"\.token_mixer\.dw2\.", ".token.aggregation.operation."),
    (r"\.channel_mixer\.dw\.lkb_origin\.", ".channel.conv.branches.large."),
    (r"\.channel_mixer\.dw\.small_conv\.", ".channel.conv.branches.small."),
    (r"\.channel_mixer\.dw\.lkb_reparam\.", ".channel.conv."),
    (r"\.bn\.(?=\w+$)", ".norm."),
    (r"\.channel_mixer\.ffnpw1\.", ".channel.within."),
    (r"\.channel_mixer\.ffnpw2\.", ".channel.across."),
    (r"\.channel_mixer\.norm\.", ".channel.norm."),
    (r"^head\.linear\.", "head."),
)
_UNUSED = ("te_patch.", "up_sample_conv.", "lat_layer.", "smooth_layer.")


@provides("53-metamixer")
class FFNetSeries(HeedModel):
    """Series (B, length, variables) to forecasts (B, horizon, variables); see the module for the equations."""

    Config = FFNetSeriesConfig

    def __init__(self, config: FFNetSeriesConfig) -> None:
        super().__init__(config)
        c = config
        self.revin = RevIN(c.variables, affine=c.affine, subtract_last=c.subtract_last) if c.normalise else None
        self.stem = nn.Sequential()
        self.stem.add_module("conv", nn.Conv1d(1, c.dims[0], c.patch, c.stride))
        self.stem.add_module("norm", nn.BatchNorm1d(c.dims[0]))
        self.merging = nn.ModuleDict()
        for i in range(1, len(c.dims)):
            self.merging[str(i)] = nn.Sequential()
            self.merging[str(i)].add_module("norm", nn.BatchNorm1d(c.dims[i - 1]))
            self.merging[str(i)].add_module("conv", nn.Conv1d(c.dims[i - 1], c.dims[i], c.downsample, c.downsample))
        self.stages = nn.ModuleList(
            nn.Sequential(*(SeriesBlock(c, i) for _ in range(depth))) for i, depth in enumerate(c.depths)
        )
        self.head = nn.Linear(c.dims[-1] * c.patches, c.horizon)
        self.head_drop = nn.Dropout(c.head_drop)
        if c.fused:
            fuse(self.eval()).train()

    def features(self, x: Float[Tensor, "B L M"]) -> Float[Tensor, "B M D N"]:
        """What the forecast is read from, for series that are normalised already."""
        c = self.config
        patches = self.stem(_repeat_last(x.mT.reshape(-1, 1, c.length), c.patch - c.stride))  # (B M, D, N)
        for i, (dim, stage) in enumerate(zip(c.dims, self.stages, strict=True)):
            if i:
                # The authors' way of filling: the last patches once more.
                missing = -patches.shape[-1] % c.downsample
                patches = torch.cat([patches, patches[..., patches.shape[-1] - missing :]], -1)
                patches = self.merging[str(i)](patches)
            patches = stage(patches.reshape(len(x), c.variables * dim, -1)).reshape(len(x) * c.variables, dim, -1)
        return patches.unflatten(0, (len(x), c.variables))

    def forward(self, x: Float[Tensor, "B L M"]) -> Float[Tensor, "B T M"]:
        c = self.config
        if x.ndim != 3 or tuple(x.shape[1:]) != (c.length, c.variables):
            raise ValueError(
                f"input {tuple(x.shape)}: this model takes series (B, {c.length}, {c.variables}) of "
                f"{c.length} steps and {c.variables} variables"
            )
        if self.revin is None:
            return self._forecast(x)
        statistics = self.revin.statistics(x)
        return self.revin.inverse(self._forecast(self.revin(x, *statistics)), *statistics)

    def _forecast(self, x: Float[Tensor, "B L M"]) -> Float[Tensor, "B T M"]:
        return self.head_drop(self.head(self.features(x).flatten(2))).mT

    def fuse(self) -> Self:
        """Fold the channel mixers' branches and BatchNorms into one kernel, in place; RuntimeError in training mode."""
        fuse(self)
        self.config = dataclasses.replace(self.config, fused=True)
        return self

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        for theirs, ours in _RENAMES:
            key = re.sub(theirs, ours, key)
        return None if key.startswith(_UNUSED) else key

    def load_authors(self, weights: dict[str, Tensor], source: str = "the authors' weights") -> Self:
        """Load a state dict that uses the authors' names; what belongs to stages that the model lacks is left out."""
        stages = len(self.config.dims)

        def used(key: str) -> bool:
            merging = re.match(r"merging\.(\d+)\.", self.authors_key(key) or "")
            return merging is None or int(merging[1]) < stages

        return super().load_authors({key: value for key, value in weights.items() if used(key)}, source)


def _swap(z: Tensor, outer: int, inner: int) -> Tensor:
    """Channels ordered (outer, inner) to channels ordered (inner, outer): (B, outer inner, N) -> the same shape."""
    return z.unflatten(1, (outer, inner)).transpose(1, 2).flatten(1, 2)


def _norm(norm: nn.BatchNorm1d, z: Tensor) -> Tensor:
    """BatchNorm over the D channels that all variables share: (B, M D, N) -> (B, M D, N)."""
    return norm(z.reshape(-1, norm.num_features, z.shape[-1])).reshape(z.shape)


def _repeat_last(x: Tensor, times: int) -> Tensor:
    return torch.cat([x, x[..., -1:].expand(*x.shape[:-1], times)], -1)


register_models(FFNetSeries, ffnet_series=FFNetSeriesConfig())
