"""MetaMixer (card 53): query-key-value mixing whose steps are free to choose, and FFNified attention, all convolutions.

    y = W_o aggregate(activate(interact(W_q x, x)), x)                            x, y (B, C, ...)

                          interact            activate       aggregate
    softmax attention     q k^T / sqrt(d)     softmax        a v                  k, v from x; a (B, heads, N, N)
    FFNified attention    DW_k q              GELU           DW_v a               no k, v from x; a (B, C, H, W)

DW_k and DW_v are depthwise convolutions: their kernels are keys and values that are learned, local, and one per channel.
The coefficients a are neither normalised nor bounded, and there is no output projection. Cost is linear in pixels.

Yun, Lee, Ro, "MetaMixer Is All You Need" (later "FFNet: MetaMixer-based Efficient Convolutional Mixer Design"), 2024,
arXiv 2406.02021.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.attention import check_heads
from heed.layers.registry import layers
from heed.layers.reparam import BranchedConv, ConvNorm, check_kernel, convolution

# depthwise(dim, kernel, ndim) -> module (B, dim, ...) -> (B, dim, ...)
Depthwise = Callable[[int, int, int], nn.Module]


@provides("53-metamixer")
class MetaMixer(nn.Module):
    """A token mixer with three free steps, (B, C, ...) -> (B, C, ...).

    Args:
        query: x -> q, usually a 1 x 1 convolution.
        interaction: (q, x) -> h, how alike queries and keys are. Keys may come from x or be learned (`Static`).
        activation: h -> a, the coefficients.
        aggregation: (a, x) -> y, values weighted by coefficients. Values may come from x or be learned (`Static`).
        projection: y -> output, default nothing.
    """

    def __init__(
        self,
        query: nn.Module,
        interaction: nn.Module,
        activation: nn.Module,
        aggregation: nn.Module,
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.query = query
        self.interaction = interaction
        self.activation = activation
        self.aggregation = aggregation
        self.projection = projection or nn.Identity()

    def coefficients(self, x: Tensor) -> Tensor:
        """What the values are weighted by."""
        return self.activation(self.interaction(self.query(x), x))

    def forward(self, x: Float[Tensor, "B C ..."]) -> Float[Tensor, "B C ..."]:
        return self.projection(self.aggregation(self.coefficients(x), x))


class Static(nn.Module):
    """A step whose keys or values are the weights of `operation`, and not made from the mixer's input."""

    def __init__(self, operation: nn.Module) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        return self.operation(queries)


@provides("53-metamixer")
class FFNifiedAttention(MetaMixer):
    """Depthwise convolution, GELU, depthwise convolution on a query: (B, dim, ...) -> (B, dim, ...).

    Args:
        dim: channels C.
        key_kernel, value_kernel: sides of the two depthwise kernels; odd.
        ndim: 2 for maps (B, C, H, W), 1 for series (B, C, N), 3 for dense volumes (B, C, D, H, W).
        query: makes the query, default a 1 x 1 convolution with BatchNorm.
        depthwise: depthwise(dim, kernel, ndim) makes the convolutions, default `depthwise_conv`.

    Raises:
        ValueError: an even kernel; an input with other channels or axes.
    """

    def __init__(
        self,
        dim: int,
        key_kernel: int = 7,
        value_kernel: int = 7,
        *,
        ndim: int = 2,
        query: nn.Module | None = None,
        depthwise: Depthwise | None = None,
    ) -> None:
        make = depthwise or depthwise_conv
        super().__init__(
            query or ConvNorm(dim, dim, ndim=ndim),
            Static(make(dim, key_kernel, ndim)),
            nn.GELU(),
            Static(make(dim, value_kernel, ndim)),
        )
        self.dim = dim
        self.ndim = ndim

    def coefficients(self, x: Tensor) -> Tensor:
        if x.ndim != self.ndim + 2 or x.shape[1] != self.dim:
            axes = {1: "N", 2: "H, W", 3: "D, H, W"}[self.ndim]
            raise ValueError(f"input {tuple(x.shape)}: {type(self).__name__} takes (B, {self.dim}, {axes})")
        return super().coefficients(x)


@provides("53-metamixer")
class FFNifiedGrid(FFNifiedAttention):
    """`FFNifiedAttention` on a grid of tokens, (B, H, W, C) -> (B, H, W, C): in the place of self-attention."""

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


@provides("53-metamixer")
class FFNifiedTokenMixer(FFNifiedAttention):
    """`FFNifiedAttention` as timm's MetaFormer takes it: MetaFormer(token_mixers=FFNifiedTokenMixer); 7 x 7 kernels.

    Args:
        dim: channels C.
        proj_drop: dropout on the output while training.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        dim: int,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        self.projection = nn.Dropout(proj_drop)
        self.to(device=device, dtype=dtype)


def depthwise_conv(dim: int, kernel: int, ndim: int = 2) -> nn.Module:
    """The depthwise convolutions of FFNet: 7 is `rep_depthwise`, the others have a bias and no BatchNorm."""
    return rep_depthwise(dim, dim, kernel, ndim=ndim) if kernel == 7 else plain_depthwise(dim, kernel, ndim)


def plain_depthwise(dim: int, kernel: int, ndim: int = 2) -> nn.Module:
    """One depthwise convolution with a bias; the border is padded with zeros."""
    return convolution(ndim)(dim, dim, check_kernel(kernel), padding=kernel // 2, groups=dim)


def rep_depthwise(
    in_dim: int, dim: int, kernel: int, small: int | None = None, *, stride: int = 1, ndim: int = 2
) -> BranchedConv:
    """Two depthwise convolutions with BatchNorm, one large and one small, to be fused into one.

    Args:
        in_dim: channels of the input, which are the groups.
        dim: channels of the output, a multiple of in_dim.
        kernel, small: sides of the kernels; small defaults to kernel // 2, and both must be odd.
        stride: step in pixels.
        ndim: axes of the input after its channels.
    """
    small = kernel // 2 if small is None else small
    if dim % in_dim:
        raise ValueError(f"dim={dim} is not a multiple of in_dim={in_dim}, the groups of a depthwise convolution")
    if kernel % 2 == 0 or small % 2 == 0 or small > kernel:
        raise ValueError(
            f"kernel={kernel} with a small kernel of {small}: the small one has to fit in the middle of the large one "
            "to be fused; give odd sides, such as 7 with 3"
        )
    return BranchedConv(
        large=ConvNorm(in_dim, dim, kernel, stride, in_dim, ndim=ndim),
        small=ConvNorm(in_dim, dim, small, stride, in_dim, ndim=ndim),
    )


class KeyScores(nn.Module):
    """q k^T / sqrt(d) per head, keys a projection of x: (B, C, ...) queries and x -> (B, heads, N, N)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = check_heads(dim, num_heads) ** -0.5
        self.key = nn.Linear(dim, dim, bias=False)

    def forward(self, q: Float[Tensor, "B C ..."], x: Float[Tensor, "B C ..."]) -> Float[Tensor, "B h N N"]:
        queries, keys = q.flatten(2), self.key(x.flatten(2).mT).mT
        queries, keys = (part.unflatten(1, (self.num_heads, -1)) for part in (queries, keys))
        return self.scale * queries.mT @ keys


class WeightedValues(nn.Module):
    """a v per head, values a projection of x: a (B, heads, N, N), x (B, C, ...) -> (B, C, ...)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.value = nn.Linear(dim, dim, bias=False)

    def forward(self, a: Float[Tensor, "B h N N"], x: Float[Tensor, "B C ..."]) -> Float[Tensor, "B C ..."]:
        values = self.value(x.flatten(2).mT).mT.unflatten(1, (self.num_heads, -1))
        return (values @ a.mT).reshape(x.shape)


@provides("53-metamixer")
class SoftmaxMixer(MetaMixer):
    """Multi-head softmax attention on maps as a MetaMixer, (B, dim, H, W) -> (B, dim, H, W), for comparisons.

    It holds the weights between all pixels, because they are what passes from one step to the next; attention that is
    not to be taken apart is faster as `heed.layers.attention.PatternAttention`.

    Args:
        dim: channels C.
        num_heads: heads; must divide dim.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(
            nn.Conv2d(dim, dim, 1, bias=False),
            KeyScores(dim, num_heads),
            nn.Softmax(-1),
            WeightedValues(dim, num_heads),
            nn.Conv2d(dim, dim, 1),
        )


@layers.register("ffnified")
def _ffnified(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    return FFNifiedGrid(dim, **options)  # type: ignore[arg-type] - each channel has a kernel of its own in place of heads
