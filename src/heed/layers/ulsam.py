"""ULSAM (card 32): one spatial attention map for every group of channels of a feature map, at 5C + 3g parameters.

With g groups of m = C / g channels, F_n of (B, m, H, W) the n-th group:

    u = maxpool3x3(ReLU(BN(w * F_n + b)))               (B, m, H, W)    w, b: one number per channel
    A_n = softmax over all H W positions of ReLU(BN(<v_n, u> + c_n))    (B, 1, H, W)
    G_n = A_n * F_n + F_n                               (B, m, H, W)    and y = [G_1, .., G_g]

Saini, Jha, Das, Mittal, Mohan, "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural
Networks", WACV 2020, arXiv 2006.15102. The batch norms and ReLUs are in the authors' code only, which is followed here.
They loop over the groups; here all groups go through one product and one grouped convolution, which is the same.
"""

from __future__ import annotations

import re
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import load_weights
from heed.layers.registry import layers


@provides("32-ulsam")
class ULSAM(nn.Module):
    """Subspace attention on feature maps of any size, (B, C, H, W) -> (B, C, H, W).

    Attention sums to 1 over the positions of a map, so every value is multiplied by 1 to 2, on average by
    1 + 1 / (H W): on large maps that is next to nothing. The authors use maps of 14 x 14 and 7 x 7.

    Args:
        channels: C.
        groups: g, how many maps; must divide channels.
        momentum: how fast the batch norms follow the batch, in PyTorch's sense. The authors' 0.9 forgets nearly all but
            the last batch; with small batches 0.1 is calmer.
        channels_last: take and return (B, H, W, C), as hosts of attention layers do.

    Raises:
        ValueError: groups that do not divide channels.
    """

    def __init__(self, channels: int, groups: int = 4, *, momentum: float = 0.9, channels_last: bool = False) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"channels={channels} is not divisible by groups={groups}")
        self.channels = channels
        self.groups = groups
        self.channels_last = channels_last
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels)
        self.bn_dws = nn.BatchNorm2d(channels, momentum=momentum)
        self.conv_point = nn.Conv2d(channels, groups, 1, groups=groups)
        self.bn_point = nn.BatchNorm2d(groups, momentum=momentum)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        maps = self._first(x)
        gain = 1 + self._attention(maps)
        y = (maps.unflatten(1, (self.groups, -1)) * gain[:, :, None]).flatten(1, 2).to(maps.dtype)
        return y.permute(0, 2, 3, 1) if self.channels_last else y

    def attention(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B g h w"]:
        """The maps A for an input of `forward`: 1 in sum over the positions, float32 or better."""
        return self._attention(self._first(x))

    def load_authors(self, weights: dict[str, Tensor]) -> None:
        """Load a state dict of the authors' module, `subspaces.n.conv_dws.weight` and so on for every group n."""
        parts: dict[str, dict[int, Tensor]] = {}
        for key, value in weights.items():
            match = re.fullmatch(r"subspaces\.(\d+)\.(.+)", key)
            if match is None:
                raise ValueError(f"{key!r} is no name of the authors' ULSAM; those start with 'subspaces.'")
            parts.setdefault(match[2], {})[int(match[1])] = value
        joined = {}
        for name, groups in parts.items():
            ordered = [groups[n] for n in sorted(groups)]
            # Counters of batches are single numbers, and the same for all groups.
            joined[name] = torch.cat(ordered) if ordered[0].ndim else ordered[0]
        load_weights(self, joined, "the authors' weights")

    def idle_parameters(self) -> list[str]:
        """Biases that batch norm takes away again while training."""
        return ["conv_dws.bias", "conv_point.bias"]

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds of the two convolutions on one map, as the paper counts; the gating is not in it."""
        return 2 * self.channels * height * width

    def extra_repr(self) -> str:
        return f"channels={self.channels}, groups={self.groups}"

    def _first(self, x: Tensor) -> Tensor:
        """(B, C, H, W), checked."""
        if x.ndim != 4:
            raise ValueError(f"input {tuple(x.shape)}: ULSAM takes maps of four axes, (B, C, H, W)")
        maps = x.permute(0, 3, 1, 2) if self.channels_last else x
        if maps.shape[1] != self.channels:
            raise ValueError(f"ULSAM has channels={self.channels}, the input {tuple(x.shape)} has {maps.shape[1]}")
        if maps.shape[2:] == (1, 1):
            warnings.warn("on a map of 1 x 1 all attention falls on the one position: ULSAM doubles it", stacklevel=3)
        return maps

    def _attention(self, maps: Tensor) -> Tensor:
        # A depthwise 1 x 1 convolution is one product per channel, and a fraction of the time when written as one.
        scaled = maps * self.conv_dws.weight[:, 0] + self.conv_dws.bias[:, None, None]  # type: ignore[index]
        u = F.relu(self.bn_dws(scaled)).contiguous(memory_format=torch.channels_last)
        u = F.max_pool2d(u, 3, 1, 1)  # on a CPU ten times faster with the channels last in memory
        s = F.relu(self.bn_point(self.conv_point(u)))
        # A softmax of its own: over the positions of a map, not over keys. Its values are near 1 / (H W), which half
        # precision would round away beside the 1 they are added to.
        precise = torch.promote_types(s.dtype, torch.float32)
        return s.flatten(2).softmax(-1, dtype=precise).view(s.shape)


@layers.register("ulsam")
def _ulsam(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    options.setdefault("groups", num_heads)
    return ULSAM(dim, channels_last=True, **options)  # type: ignore[arg-type]
