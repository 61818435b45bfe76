"""Local heads, which attend inside blocks and to the blocks around, and strided heads, which attend across blocks.

    block i holds b tokens (n-d: prod b of a box); its memory is the blocks within m / b of it on every axis:
    those before it in raster order and itself when masked, all of them otherwise                  (B, H, blocks, M, d)
    y_i = softmax(q_i k[memory_i]^T + bias) v[memory_i]    by `relative.attend_group`             (B, H, blocks, b, d)

    strided:  y_t = attention of t to the tokens t', t' = t modulo b (t' <= t when masked)

Memory beyond the edges is zeros, which the test for zero values hides. When not masked, relative places are counted from
the last block of the memory and not from the own one, as in the authors' code. The card describes no arithmetic for
strided heads: theirs is heed's reading, after Child et al., arXiv 1904.10509. Roy et al., TACL 2021, arXiv 2003.05997.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from heed.catalogue import provides
from heed.language.routing.config import RoutingSettings
from heed.language.routing.relative import RelativePositions, attend_group, visible_bias

Shape = tuple[int, ...]


@provides("08-routing")
def to_blocks(x: Shaped[Tensor, "B *S d"], block: Shape) -> Shaped[Tensor, "B blocks b d"]:
    """Tokens of a grid as blocks, both in raster order, after zeros at the ends where blocks do not tile the grid."""
    sizes = x.shape[1:-1]
    missing = [-size % side for size, side in zip(sizes, block, strict=True)]
    if any(missing):
        x = F.pad(x, (0, 0, *itertools.chain.from_iterable((0, extra) for extra in reversed(missing))))
    counts = grid_of(sizes, block)
    rank = len(block)
    split = x.reshape(x.shape[0], *itertools.chain.from_iterable(zip(counts, block, strict=True)), x.shape[-1])
    outer, inner = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    return split.permute(0, *outer, *inner, 2 * rank + 1).reshape(
        x.shape[0], math.prod(counts), math.prod(block), x.shape[-1]
    )


@provides("08-routing")
def from_blocks(x: Shaped[Tensor, "B blocks b d"], sizes: Shape, block: Shape) -> Shaped[Tensor, "B *S d"]:
    """The inverse of `to_blocks`: a grid of these sizes, without what was added."""
    counts, rank = grid_of(sizes, block), len(block)
    split = x.reshape(x.shape[0], *counts, *block, x.shape[-1])
    order = itertools.chain.from_iterable((1 + i, 1 + rank + i) for i in range(rank))
    padded = [count * side for count, side in zip(counts, block, strict=True)]
    grid = split.permute(0, *order, 2 * rank + 1).reshape(x.shape[0], *padded, x.shape[-1])
    return grid[(slice(None), *(slice(size) for size in sizes))]


def grid_of(sizes: Shape, block: Shape) -> Shape:
    """Blocks per axis."""
    return tuple(-(-size // side) for size, side in zip(sizes, block, strict=True))


@lru_cache(maxsize=64)
def memory_blocks(counts: Shape, reach: Shape, masked: bool) -> Int64[Tensor, "blocks memory"]:
    """Numbers of the blocks each block sees, in raster order; the number of blocks stands for one beyond the edge."""
    offsets = list(itertools.product(*(range(-r, r + 1) for r in reach)))
    if masked:
        offsets = offsets[: len(offsets) // 2 + 1]
    at = torch.tensor(list(itertools.product(*map(range, counts)))).view(-1, 1, len(counts))
    seen = at + torch.tensor(offsets)
    limits = torch.tensor(counts)
    inside = ((seen >= 0) & (seen < limits)).all(-1)
    strides = torch.tensor([math.prod(counts[i + 1 :]) for i in range(len(counts))])
    return (seen * strides).sum(-1).masked_fill(~inside, math.prod(counts))


@provides("08-routing")
class LocalHeads(nn.Module):
    """Heads that attend inside blocks and to neighbouring blocks, on (B, H, T, d) whose tokens are in blocked order.

    Args:
        settings: block, flange, masking, relative positions.
    """

    def __init__(self, settings: RoutingSettings) -> None:
        super().__init__()
        self.size = math.prod(settings.block)
        self.masked, self.dropout = settings.masked, settings.attn_dropout
        self.reach = tuple(m // b for m, b in zip(settings.memory_flange, settings.block, strict=True))
        reach = settings.reach("local")
        self.relative = None if reach is None else RelativePositions(reach, settings.head_dim)

    def forward(
        self,
        q: Float[Tensor, "B H T d"],
        k: Float[Tensor, "B H T d"],
        v: Float[Tensor, "B H T d"],
        counts: Shape,
        padding: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B H T d"]:
        """Attend; T is `counts` blocks (per axis) of b tokens each, and padding is True where a key is none."""
        table = memory_blocks(counts, self.reach, self.masked).to(q.device)
        blocked = [x.flatten(0, 1).unflatten(1, (-1, self.size)) for x in (q, k, v)]
        keys, values = (F.pad(x, (0, 0, 0, 0, 0, 1))[:, table].flatten(2, 3) for x in blocked[1:])
        hidden = None
        if padding is not None:
            blocks = F.pad(padding.unflatten(1, (-1, self.size)), (0, 0, 0, 1))
            hidden = blocks[:, table].flatten(2).repeat_interleave(q.shape[1], 0)
        bias = visible_bias(values, self.size, masked=self.masked, padding=hidden)
        dropout = self.dropout if self.training else 0.0
        return attend_group(blocked[0], keys, values, bias, self.relative, dropout).view(q.shape)

    def step(
        self,
        q: Float[Tensor, "B H 1 d"],
        k: Float[Tensor, "B H T d"],
        v: Float[Tensor, "B H T d"],
        at: int,
        counts: Shape,
    ) -> Float[Tensor, "B H 1 d"]:
        """Attention of the token at place `at`, the last of k and v, in a text of `counts` blocks."""
        row = memory_blocks(counts, self.reach, True)[at // self.size]
        places = (row[:, None] * self.size + torch.arange(self.size)).flatten()
        places = places[: len(places) - self.size + at % self.size + 1].to(q.device)
        beyond = (places > at)[:, None]  # the edge
        keys, values = (x[:, :, places.clamp(max=at)].masked_fill(beyond, 0) for x in (k, v))
        return attend_group(q, keys, values, visible_bias(values, 1, masked=False), self.relative)


@provides("08-routing")
class StridedHeads(nn.Module):
    """Heads that attend to the tokens a multiple of b away, on (B, H, T, d).

    Args:
        settings: block, whose number of tokens is the stride, masking, relative positions.
    """

    def __init__(self, settings: RoutingSettings) -> None:
        super().__init__()
        self.stride = math.prod(settings.block)
        self.masked, self.dropout = settings.masked, settings.attn_dropout
        reach = settings.reach("strided")
        self.relative = None if reach is None else RelativePositions(reach, settings.head_dim)

    def forward(
        self,
        q: Float[Tensor, "B H T d"],
        k: Float[Tensor, "B H T d"],
        v: Float[Tensor, "B H T d"],
        padding: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B H T d"]:
        """Attend; the stride divides T, and padding is True where a key is none."""
        shape = q.shape
        q, k, v = (x.flatten(0, 1).unflatten(1, (-1, self.stride)).transpose(1, 2) for x in (q, k, v))
        hidden = None
        if padding is not None:
            hidden = padding.unflatten(1, (-1, self.stride)).transpose(1, 2).repeat_interleave(shape[1], 0)
        bias = visible_bias(v, q.shape[-2], masked=self.masked, padding=hidden)
        dropout = self.dropout if self.training else 0.0
        y = attend_group(q, k, v, bias, self.relative, dropout)
        return y.transpose(1, 2).reshape(shape)

    def step(
        self, q: Float[Tensor, "B H 1 d"], k: Float[Tensor, "B H T d"], v: Float[Tensor, "B H T d"], at: int
    ) -> Float[Tensor, "B H 1 d"]:
        """Attention of the token at place `at`, the last of k and v."""
        k, v = (x[:, :, at % self.stride : at + 1 : self.stride] for x in (k, v))
        return attend_group(q, k, v, visible_bias(v, 1, masked=False), self.relative)
