"""The HyperZ.Z.W operator (card 36): a generated kernel is multiplied with the features, and the product applied to them.

    W   = slow net                                          (1, C, S, S), see `heed.layers.slow_net`
    Z.W = x * W                                             (B, C, S, S), a kernel that now depends on the context
    Z   = IS(RGU(Z.W) + RGU'(x))                            the fast net; IS standardises each map of each sample
    out = (Z.W) @ Z                                         S x S by S x S, per sample and channel
    RGU(u) = L_y(GELU(IS(L_k(u) * L_q(L_v(u)))) + p)        L linear maps of the channels, p (1, 1, S, S) learned

Every output sees its row of x * W and its column of Z, and each of these, through IS, its whole map. The cost per channel
is S^3, which is N^1.5 of N = S^2 positions. There is no shift equivariance: kernels have a place for every position.
Maps are channels-first here. On sequences, (B, C, S), the product is a circular convolution: heed's own reading, since
the author released the code for images only.

Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", 2024, arXiv 2401.17948. The
abstract speaks of a convolution with the context-dependent kernel; in the author's code it is this matrix product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.registry import layers
from heed.layers.slow_net import OMEGA, ContextSlowNet, SlowNet, channel_mixer


@provides("36-hyperzzw")
def hyperzzw_global(context: Float[Tensor, "B C *S"], z: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
    """Apply the context-dependent kernels to z: the product of matrices S x S, or a circular convolution of sequences.

    Raises:
        ValueError: maps of different shapes, or that are not square.
    """
    if context.shape != z.shape or context.ndim not in (3, 4) or (context.ndim == 4 and z.shape[2] != z.shape[3]):
        raise ValueError(
            f"kernels {tuple(context.shape)} and maps {tuple(z.shape)} must both be (B, C, S, S), or both (B, C, S)"
        )
    if z.ndim == 4:
        return context @ z
    spectrum = torch.fft.rfft(context.float()) * torch.fft.rfft(z.float())
    return torch.fft.irfft(spectrum, z.shape[-1]).to(z.dtype)


@provides("36-hyperzzw")
def hyperzzw_local(kernel: Float[Tensor, "C 1 *k"], z: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
    """Convolve each channel with its kernel of odd size; the border is padded with zeros.

    Raises:
        ValueError: kernels of an even size, or for another number of channels.
    """
    size = kernel.shape[-1]
    if kernel.shape[0] != z.shape[1] or size % 2 == 0:
        raise ValueError(f"kernels {tuple(kernel.shape)} for maps {tuple(z.shape)} must be (C, 1, k, k) with odd k")
    convolve = F.conv1d if z.ndim == 3 else F.conv2d
    return convolve(z, kernel, padding=size // 2, groups=z.shape[1])


@provides("36-hyperzzw")
def hyperzzw_twofold(kernel: Float[Tensor, "#B 1 *S"], z: Float[Tensor, "B 1 *S"]) -> Float[Tensor, "B 1 *S"]:
    """z * kernel * z, element by element, of means over positions (B, 1, C) or over channels (B, 1, *S): even in z."""
    return z * kernel * z


@provides("36-hyperzzw")
def si_glu(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """The self-interaction gate sigmoid(x) * x."""
    return F.silu(x)


def standardise_batch(x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
    """Mean 0 and variance 1 per channel over samples and positions, of this batch in evaluation too."""
    return F.batch_norm(x, None, None, training=True)


def standardise_instance(x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
    """Mean 0 and variance 1 per sample and channel."""
    return F.instance_norm(x)


@provides("36-hyperzzw")
class GroupStandardisation(nn.Module):
    """Group-based instance-batch standardisation, (B, dim, *S) -> same: no parameters and no running statistics.

    Of equal groups of channels the even ones are standardised over the batch, the odd ones per sample. The output for a
    sample depends on the others of its batch, in evaluation too.

    Args:
        dim: channels, a multiple of `groups`.
        groups: an even number.

    Raises:
        ValueError: channels that do not divide so.
    """

    def __init__(self, dim: int, groups: int = 12) -> None:
        super().__init__()
        if groups < 2 or groups % 2 or dim % groups:
            raise ValueError(f"dim={dim} must be a multiple of groups={groups}, and these an even number")
        self.groups = groups

    def forward(self, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        grouped = x.unflatten(1, (self.groups // 2, 2, -1))
        parts = (
            standardise_batch(grouped[:, :, 0].flatten(1, 2)),
            standardise_instance(grouped[:, :, 1].flatten(1, 2)),
        )
        return torch.stack([part.unflatten(1, (self.groups // 2, -1)) for part in parts], 2).flatten(1, 3)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"


@provides("36-hyperzzw")
class RGU(nn.Module):
    """Recursive gated unit, (B, dim, *S) -> same: L_y(GELU(IS(L_k(u) * L_q(L_v(u)))) + p).

    Args:
        dim: channels.
        size: positions per axis S.
        axes: 2 for maps, 1 for sequences.
    """

    def __init__(self, dim: int, size: int, axes: int = 2) -> None:
        super().__init__()
        self.k, self.v, self.q, self.y = (channel_mixer(dim, dim, axes) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(1, 1, *(size,) * axes))

    def forward(self, u: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        return self.y(F.gelu(standardise_instance(self.k(u) * self.q(self.v(u)))) + self.bias)


class GlobalParts(NamedTuple):
    """What `GlobalHyperZZW` multiplies.

    Args:
        kernel: W, (1, C, *S).
        context: x * W, (B, C, *S).
        fast: Z, (B, C, *S).
    """

    kernel: Tensor
    context: Tensor
    fast: Tensor


@provides("36-hyperzzw")
class GlobalHyperZZW(nn.Module):
    """The operator on maps of a fixed size, (B, dim, *S) -> (B, dim, *S); the equations open this module.

    Args:
        dim: channels C.
        size: positions per axis S, at least 2.
        hidden, layers, omega: of the slow net, see `SlowNet`.
        axes: 2 for maps (B, C, S, S), 1 for sequences (B, C, S).

    Raises:
        ValueError: a size below 2; maps of another size.
    """

    def __init__(
        self, dim: int, size: int, hidden: int = 64, layers: int = 2, *, axes: int = 2, omega: float = OMEGA
    ) -> None:
        super().__init__()
        if size < 2:
            raise ValueError(f"size={size}: maps of one position have no spread to standardise; give at least 2")
        self.dim, self.size, self.axes = dim, size, axes
        self.slow = SlowNet(size, dim, hidden, layers, axes=axes, omega=omega)
        self.rgu_x = RGU(dim, size, axes)
        self.rgu_context = RGU(dim, size, axes)

    def parts(self, x: Float[Tensor, "B C *S"]) -> GlobalParts:
        """The kernel, the context and the fast net's output."""
        wanted = (self.dim, *(self.size,) * self.axes)
        if x.shape[1:] != wanted:
            raise ValueError(
                f"input {tuple(x.shape)}: this operator is made for maps (B, {', '.join(map(str, wanted))}) and no "
                "other size; its kernels have a place for every position"
            )
        kernel = self.slow()
        context = x * kernel
        return GlobalParts(kernel, context, standardise_instance(self.rgu_context(context) + self.rgu_x(x)))

    def forward(self, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        parts = self.parts(x)
        return hyperzzw_global(parts.context, parts.fast)


@provides("36-hyperzzw")
class HyperZZWMixer(nn.Module):
    """The operator on a square grid of tokens, in the place of self-attention: (B, S, S, dim) -> (B, S, S, dim).

    A linear map follows it, as in self-attention; that is heed's addition, since the author's block has its own. Samples
    do not depend on each other.

    Args:
        dim, size, hidden, layers, omega: see `GlobalHyperZZW`.
    """

    def __init__(self, dim: int, size: int, hidden: int = 64, layers: int = 2, *, omega: float = OMEGA) -> None:
        super().__init__()
        self.operator = GlobalHyperZZW(dim, size, hidden, layers, omega=omega)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        if x.ndim != 4:
            raise ValueError(f"input {tuple(x.shape)}: give a grid of tokens (B, H, W, C)")
        return self.proj(self.operator(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@provides("36-hyperzzw")
class LocalHyperZZW(nn.Module):
    """A depthwise convolution with a kernel that other features choose, then Linear, BS, GELU and a scalar bias.

    Args:
        dim: channels C.
        size: side of the kernel, odd.
        hidden, layers, axes, omega, learnable: of the slow net, see `ContextSlowNet`.
    """

    def __init__(
        self,
        dim: int,
        size: int,
        hidden: int = 32,
        layers: int = 2,
        *,
        axes: int = 2,
        omega: float = OMEGA,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        self.slow = ContextSlowNet(size, dim, hidden, layers, axes=axes, omega=omega, learnable=learnable)
        self.mixer = channel_mixer(dim, dim, axes)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "B C *S"], source: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        """Convolve x with the kernel of `source`."""
        return F.gelu(standardise_batch(self.mixer(hyperzzw_local(self.slow(source), x)))) + self.bias


@provides("36-hyperzzw")
class HyperChannelInteraction(nn.Module):
    """x * sigmoid(y * W * y) with y (B, 1, C) the mean of each channel and W (1, 1, C) of a slow net: (B, C, *S) -> same.

    Args:
        dim: channels C.
        hidden, layers, omega: of the slow net, see `SlowNet`.
    """

    def __init__(self, dim: int, hidden: int = 32, layers: int = 2, *, omega: float = OMEGA) -> None:
        super().__init__()
        self.slow = SlowNet(dim, 1, hidden, layers, axes=1, omega=omega)

    def forward(self, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        return x * channel_interaction(self.slow, x).sigmoid()


@provides("36-hyperzzw")
class HyperInteraction(nn.Module):
    """x * sigmoid(channel score * spatial score of y): (B, C, *S), (B, C, *S) -> (B, C, *S).

    Both scores are two-fold products with kernels of slow nets: the channel score of the means over positions (B, C, 1, 1),
    the spatial score of the mean over channels (B, 1, S, S).

    Args:
        dim: channels C.
        size: positions per axis S.
        channel_hidden, spatial_hidden, layers, axes, omega: of the slow nets, see `SlowNet`.
    """

    def __init__(
        self,
        dim: int,
        size: int,
        channel_hidden: int = 16,
        spatial_hidden: int = 64,
        layers: int = 2,
        *,
        axes: int = 2,
        omega: float = OMEGA,
    ) -> None:
        super().__init__()
        self.channel_slow = SlowNet(dim, 1, channel_hidden, layers, axes=1, omega=omega)
        self.spatial_slow = SlowNet(size, 1, spatial_hidden, layers, axes=axes, omega=omega)

    def forward(self, x: Float[Tensor, "B C *S"], y: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        spatial = hyperzzw_twofold(self.spatial_slow(), y.mean(1, keepdim=True))
        return x * (channel_interaction(self.channel_slow, y) * spatial).sigmoid()


def channel_interaction(slow: SlowNet, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *one"]:
    """The two-fold product of the channels' means with a kernel over channels."""
    means = x.flatten(2).mean(2)[:, None]
    return hyperzzw_twofold(slow(), means).view(x.shape[0], -1, *(1,) * (x.ndim - 2))


@layers.register("hyperzzw")
def _hyperzzw(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    # There are no heads: each channel has a kernel of its own.
    if grid[0] != grid[1]:
        raise ValueError(f"grid={grid}: HyperZ.Z.W multiplies maps as matrices and needs a square grid of tokens")
    return HyperZZWMixer(dim, grid[0], **options)  # type: ignore[arg-type]
