"""Layers of a routing transformer, normalised after each part, as text models, encoders and image models share them.

    x <- LN(x + drop(attention(x)));   x <- LN(x + drop(attention(x, memory)));   x <- LN(x + drop(ffn(x)))     (B, *S, D)
    geglu(x) = drop(gelu(x W1) * (x W2)) W3,   relu(x) = drop(relu(x W1 + b1)) W2 + b2

The middle part stands in decoders with an encoder only; its place and its heads (all routing, without relative
positions) are heed's reading. LN has eps 1e-6, and there is no norm at the end. Roy et al., TACL 2021, arXiv 2003.05997.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.language.routing.cache import LayerCache
from heed.language.routing.config import RoutingConfig
from heed.language.routing.layer import RoutingAttention


class FeedForward(nn.Module):
    """GEGLU without biases, or a ReLU network with."""

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__()
        c = config
        bias = c.ffn == "relu"
        self.weight1 = nn.Linear(c.dim, c.ffn_dim, bias=bias)
        self.weight2 = nn.Linear(c.ffn_dim, c.dim) if bias else nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.weight3 = None if bias else nn.Linear(c.ffn_dim, c.dim, bias=False)
        self.drop = nn.Dropout(c.ffn_dropout)
        init_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight3 is None:
            return self.weight2(self.drop(F.relu(self.weight1(x))))
        return self.weight3(self.drop(F.gelu(self.weight1(x), approximate="tanh") * self.weight2(x)))


class RoutingBlock(nn.Module):
    """Attention, attention to a memory where there is one, and the feed-forward network."""

    def __init__(self, config: RoutingConfig, *, local_only: bool = False, cross: bool = False) -> None:
        super().__init__()
        c = config
        own = dataclasses.replace(
            c, local_heads=c.heads, cluster_heads=0, cluster_strided_heads=0, strided_heads=0
        ) if local_only else c  # fmt: skip
        self.attn = RoutingAttention(own)
        self.norm1 = nn.LayerNorm(c.dim, eps=1e-6)
        self.cross = None
        if cross:
            heads = dataclasses.replace(
                c, cluster_heads=c.heads, cluster_strided_heads=0, strided_heads=0, local_heads=0, relative=(),
                share_qk=False, masked=False,
            )  # fmt: skip
            self.cross = RoutingAttention(heads)
            self.cross_norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.ffn = FeedForward(c)
        self.norm2 = nn.LayerNorm(c.dim, eps=1e-6)
        self.drop = nn.Dropout(c.dropout)

    def forward(
        self,
        x: Float[Tensor, "B *S D"],
        memory: Float[Tensor, "B M D"] | None = None,
        *,
        padding: Bool[Tensor, "B ..."] | None = None,
        memory_padding: Bool[Tensor, "B M"] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Tensor, "B *S D"], Float[Tensor, ""]]:
        y, loss = self.attn(x, padding=padding, cache=cache)
        x = self.norm1(x + self.drop(y))
        if self.cross is not None and memory is not None:
            y, more = self.cross(x, memory, padding=memory_padding)
            x, loss = self.cross_norm(x + self.drop(y)), loss + more
        return self.norm2(x + self.drop(self.ffn(x))), loss

    def step(self, x: Float[Tensor, "B 1 D"], cache: LayerCache) -> Float[Tensor, "B 1 D"]:
        x = self.norm1(x + self.attn.step(x, cache))
        return self.norm2(x + self.ffn(x))


@provides("08-routing")
class RoutingStack(nn.ModuleList):
    """`config.layers` blocks, the first `skip_first` with local heads only; (B, *S, D) to the same, and the summed losses.

    Args:
        config: of the model.
        cross: blocks attend to a memory, too.
    """

    def __init__(self, config: RoutingConfig, *, cross: bool = False) -> None:
        super().__init__(
            RoutingBlock(config, local_only=i < config.skip_first, cross=cross) for i in range(config.layers)
        )

    def forward(
        self,
        x: Float[Tensor, "B *S D"],
        memory: Float[Tensor, "B M D"] | None = None,
        *,
        padding: Bool[Tensor, "B ..."] | None = None,
        memory_padding: Bool[Tensor, "B M"] | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> tuple[Float[Tensor, "B *S D"], Float[Tensor, ""]]:
        """Run all blocks; see `RoutingAttention` for the arguments."""
        loss = x.new_zeros(())
        for i, block in enumerate(self):
            cache = None if caches is None else caches[i]
            x, more = block(x, memory, padding=padding, memory_padding=memory_padding, cache=cache)
            loss = loss + more
        return x, loss

    def step(self, x: Float[Tensor, "B 1 D"], caches: Sequence[LayerCache]) -> Float[Tensor, "B 1 D"]:
        """The next token's features; the caches grow by it."""
        for block, cache in zip(self, caches, strict=True):
            assert isinstance(block, RoutingBlock)
            x = block.step(x, cache)
        return x


class AuxiliaryLoss(nn.Module):
    """A model that keeps the clustering loss of its last forward pass in `auxiliary_loss`, which is never copied or
    saved."""

    auxiliary_loss: Tensor

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "auxiliary_loss"}


def init_linear(module: nn.Module) -> None:
    """Uniform with variance 0.2 / (mean of a map's two widths) for the linear maps and tables inside, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.xavier_uniform_(part.weight, gain=0.2**0.5)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def sinusoids(positions: Float[Tensor, " T"], dim: int) -> Float[Tensor, "T dim"]:
    """sin of all frequencies, then cos, from 1 to 1/10000 per position; a zero where dim is odd."""
    count = dim // 2
    rates = torch.exp(-math.log(1e4) / max(1, count - 1) * torch.arange(count, device=positions.device))
    angles = positions[:, None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, dim % 2))
