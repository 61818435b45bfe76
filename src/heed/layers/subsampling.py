"""Stochastically subsampled self-attention (card 41): a new draw of sources for every layer and step of training.

    unbiased          S = N / r sources, drawn evenly              local   blocks of w = N / r places, sigma = w / 2
    connection        pairs drop out with probability p            source_dropout   sources drop out with probability p

The first two compute 1 / r of the scores; the last two are regularisers. In eval mode attention is dense: the draws are a way
of training, and what is trained is an ordinary transformer. See `heed.layers.subsampled` for the rules.
Hussain et al., KDD 2023 (arXiv 2306.01705). sigma = w / 2 and the random shift of the blocks are heed's own choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.checks import check_tokens, per_axis, positive_ints
from heed.engine.pattern import Pattern
from heed.engine.patterns import Causal, Full
from heed.errors import unknown
from heed.layers.attention import PatternAttention
from heed.layers.registry import layers
from heed.layers.subsampled import Blocks, Connections, Draw, Dropped, Sources

Mode = Literal["unbiased", "local", "connection", "source_dropout"]


@provides("41-subsampled-ssa")
@dataclass(frozen=True)
class Subsampling:
    """How sources are drawn.

    Args:
        mode: "unbiased", "local", "connection" or "source_dropout", see the module.
        ratio: r >= 1, how many times fewer sources a target has (unbiased, local); at least one is kept. 1 is dense.
        keep: S or w itself, in place of N / ratio (unbiased, local).
        sigma: noise of the shuffle in tokens (local); default half a block. 0 gives plain blocks, much more than the
            sequence a random partition.
        p: probability of dropping out, in [0, 1) (connection, source_dropout).
        per_sample: a draw of its own for every batch element, instead of one that all share, which is faster
            (unbiased, local). source_dropout always has its own.
        prefix: first tokens (class token, registers) that are always sources; in "local" they see all sources, too.
        window: rows and columns of a window; needs a grid when drawing. "local" then shuffles pixels listed window by window,
            in blocks of one window, and `ratio` has no say. (heed's own reading of window attention hosts.)
    """

    mode: Mode = "unbiased"
    ratio: float = 4.0
    keep: int | None = None
    sigma: float | None = None
    p: float = 0.3
    per_sample: bool = False
    prefix: int = 0
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(unknown("mode of subsampling", self.mode, get_args(Mode)))
        if not (math.isfinite(self.ratio) and self.ratio >= 1):
            raise ValueError(f"ratio={self.ratio} must be at least 1: how many times fewer sources there are")
        if self.keep is not None:
            positive_ints("keep", (self.keep,))
        if self.sigma is not None and not self.sigma >= 0:
            raise ValueError(f"sigma={self.sigma} must be >= 0 tokens")
        if not 0 <= self.p < 1:
            raise ValueError(f"p={self.p} must be a probability in [0, 1)")
        if self.prefix < 0:
            raise ValueError(f"prefix={self.prefix} must be >= 0 tokens")
        if self.window is not None:
            if self.mode != "local":
                raise ValueError(f"window={self.window} is for mode='local', not {self.mode!r}")
            object.__setattr__(self, "window", per_axis("window", self.window, 2))

    @property
    def saves(self) -> bool:
        """Whether fewer scores are computed."""
        return self.mode in ("unbiased", "local")

    def size(self, tokens: int) -> int:
        """S or w for `tokens` sources without the prefix: how many a target has."""
        if self.window is not None:
            return min(tokens, math.prod(self.window))
        if self.keep is not None:
            if self.keep > tokens:
                raise ValueError(f"keep={self.keep} exceeds the {tokens} sources there are to draw from")
            return self.keep
        return max(1, int(tokens / self.ratio))

    def draw(
        self,
        batch: int,
        targets: int,
        sources: int | None = None,
        *,
        heads: int = 1,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
        real: Bool[Tensor, "B M"] | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Draw:
        """A draw for one layer and step.

        Args:
            batch: B.
            targets, sources: N and M; M defaults to N.
            heads: H, each with its own lost connections ("connection").
            device: where the tensors are.
            generator: makes the draw repeatable, on its own device; default torch's, whose state checkpointing keeps.
            real: False where a source is padding: those are drawn last, per batch element (unbiased, source_dropout).
            grid: rows and columns of the tokens that are not prefix, for `window`.

        Raises:
            ValueError: more prefix than tokens, or a window without a grid.
        """
        sources = targets if sources is None else sources
        free = sources - self.prefix
        if free < 1:
            raise ValueError(f"prefix={self.prefix} leaves none of {sources} sources to draw from")
        noise = _Noise(batch if self.per_sample or real is not None else 1, device, generator)
        if self.mode == "unbiased":
            return Sources(self._sources(free, noise, real))
        if self.mode == "local":
            width = self.size(free)
            shift = int(noise.even(1)[0, 0] * width)
            sigma = width / 2 if self.sigma is None else self.sigma
            order = local_order(noise.normal(free), sigma, shift, self._listing(grid, free))
            return Blocks(order + self.prefix, width, self.prefix)
        noise.rows = batch
        if self.mode == "connection":
            return Connections(noise.even(heads * targets * sources).view(batch, heads, targets, sources) < self.p)
        chance = noise.even(sources)
        dropped = chance < self.p
        dropped[:, : self.prefix] = False
        if real is not None:
            chance = chance.masked_fill(~real, -1)
        # The one that was nearest to staying stays, where none would.
        lost = (dropped | (~real if real is not None else False)).all(-1)
        dropped[lost, chance.argmax(-1)[lost]] = False
        return Dropped(dropped)

    def _sources(self, free: int, noise: _Noise, real: Tensor | None) -> Tensor:
        chance = noise.even(free)
        if real is not None:
            chance = chance + ~real[:, self.prefix :]
        drawn = chance.argsort(-1)[:, : self.size(free)] + self.prefix
        first = torch.arange(self.prefix, device=drawn.device).expand(len(drawn), -1)
        return torch.cat([first, drawn], -1)

    def _listing(self, grid: tuple[int, ...] | None, tokens: int) -> Tensor | None:
        if self.window is None:
            return None
        if grid is None or len(grid) != 2:
            raise ValueError(f"window={self.window} needs the rows and columns of the tokens, not grid={grid}")
        check_tokens("Subsampling", grid, tokens, "tokens")
        return windows_first(grid, self.window)


class _Noise:
    """Random numbers in float32: in half precision, argsort would meet ties."""

    def __init__(self, rows: int, device: torch.device | str, generator: torch.Generator | None) -> None:
        self.rows, self.device, self.generator = rows, device, generator
        self.home = device if generator is None else generator.device

    def even(self, columns: int) -> Tensor:
        """(rows, columns) in [0, 1)."""
        return torch.rand(self.rows, columns, generator=self.generator, device=self.home).to(self.device)

    def normal(self, columns: int) -> Tensor:
        """(rows, columns) standard normal."""
        return torch.randn(self.rows, columns, generator=self.generator, device=self.home).to(self.device)


@provides("41-subsampled-ssa")
def local_order(
    noise: Float[Tensor, "B N"], sigma: float, shift: int = 0, listing: Int[Tensor, " N"] | None = None
) -> Int[Tensor, "B N"]:
    """The noisy shuffle of mode "local": tokens in the order of place + sigma * noise, rolled left by `shift`.

    Args:
        noise: (B, N) standard normal.
        sigma: in places, >= 0.
        shift: how far the borders of the blocks move.
        listing: (N,) the token at every place before the shuffle; default their own order.
    """
    if not sigma >= 0:
        raise ValueError(f"sigma={sigma} must be >= 0")
    place = torch.arange(noise.shape[1], device=noise.device, dtype=noise.dtype)
    order = (place + sigma * noise).argsort(dim=-1, stable=True).roll(-shift, -1)
    return order if listing is None else listing.to(order.device)[order]


@provides("41-subsampled-ssa")
def windows_first(grid: tuple[int, ...], window: tuple[int, int]) -> Int[Tensor, " N"]:
    """The tokens of a grid (row-major) window by window, row-major within each; windows at the ends may be smaller."""
    row, column = (x.flatten() for x in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    (height, width), across = window, -(-grid[1] // window[1])
    of_window = row // height * across + column // width
    return torch.argsort(of_window, stable=True)


@provides("41-subsampled-ssa")
def subsampled_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B G M D"],
    v: Float[Tensor, "B G M E"],
    subsampling: Subsampling,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    real: Bool[Tensor, "B M"] | None = None,
    grid: tuple[int, ...] | None = None,
) -> Float[Tensor, "B H N E"]:
    """Attention to a random part of the sources.

        y = subsampled_attention(q, k, v, Subsampling("unbiased", ratio=8))

    Args:
        q, k, v, causal, mask, scale, dropout: as in `Draw.attend`.
        subsampling: what is drawn.
        generator, real, grid: as in `Subsampling.draw`.

    Raises:
        ValueError: causal cross-attention, a mask that does not fit, causal attention with a prefix.
    """
    if causal and subsampling.prefix:
        raise ValueError(f"prefix={subsampling.prefix}: causal attention has no tokens that all others see; prefix=0")
    (batch, heads, n, _), m = q.shape, k.shape[2]
    draw = subsampling.draw(batch, n, m, heads=heads, device=q.device, generator=generator, real=real, grid=grid)
    return draw.attend(q, k, v, causal=causal, mask=mask, scale=scale, dropout=dropout)


@provides("41-subsampled-ssa")
@dataclass(frozen=True)
class SubsampledCost:
    """Work and memory of one layer, forward; projections and MLP are not among them.

    Args:
        flops, dense_flops: operations of the two products, two per multiply-add.
        probabilities, dense_probabilities: bytes of the attention weights, where a kernel keeps them.
    """

    flops: float
    dense_flops: float
    probabilities: float
    dense_probabilities: float

    @property
    def saving(self) -> float:
        """How many times fewer operations, and bytes."""
        return self.dense_flops / self.flops


@provides("41-subsampled-ssa")
def subsampled_cost(
    subsampling: Subsampling, tokens: int, heads: int, width: int, batch: int = 1, itemsize: int = 4
) -> SubsampledCost:
    """4 B H N S d operations in place of 4 B H N^2 d, for bidirectional attention of N tokens in H heads of width d."""
    prefix = subsampling.prefix
    free = tokens - prefix
    if not subsampling.saves:
        pairs = tokens**2
    elif subsampling.mode == "unbiased":
        pairs = tokens * (prefix + subsampling.size(free))
    else:
        size = subsampling.size(free)
        pairs = prefix * tokens + free * prefix + free // size * size**2 + (free % size) ** 2
    return SubsampledCost(
        4.0 * batch * heads * pairs * width,
        4.0 * batch * heads * tokens**2 * width,
        1.0 * batch * heads * pairs * itemsize,
        1.0 * batch * heads * tokens**2 * itemsize,
    )


@provides("41-subsampled-ssa")
class SubsampledAttention(PatternAttention):
    """Self-attention on a sequence or grid, subsampled in train mode and dense in eval mode: (B, ..., C) -> (B, ..., C).

    Args:
        dim: channels C.
        num_heads: heads; must divide dim.
        subsampling: what is drawn in every forward pass; default "unbiased", ratio 4.
        causal: a token sees those before it and itself, on a sequence; the default draw is then "local".
        options: qkv_bias, qk_scale, attn_drop, proj_drop, as in `PatternAttention`.

    Attributes:
        generator: a `torch.Generator` for the draws; None for torch's own.
        always: whether eval mode draws, too, as a member of an ensemble does.

    Raises:
        ValueError: causal attention on a grid, or with prefix tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        subsampling: Subsampling | None = None,
        *,
        causal: bool = False,
        **options: object,
    ) -> None:
        super().__init__(dim, num_heads, **options)  # type: ignore[arg-type]
        self.subsampling = subsampling or Subsampling("local" if causal else "unbiased")
        if causal and self.subsampling.prefix:
            raise ValueError("causal attention has no tokens that all others see; prefix=0")
        self.causal = causal
        self.generator: torch.Generator | None = None
        self.always = False

    def mix(
        self,
        q: Float[Tensor, "B heads N d"],
        k: Float[Tensor, "B heads N d"],
        v: Float[Tensor, "B heads N d"],
        layout: tuple[int, ...],
    ) -> Float[Tensor, "B heads N d"]:
        if self.causal and len(layout) > 1:
            raise ValueError(f"causal attention is on a sequence, not on a grid {layout}; flatten the tokens")
        if not (self.training or self.always):
            return super().mix(q, k, v, layout)
        return subsampled_attention(
            q,
            k,
            v,
            self.subsampling,
            causal=self.causal,
            scale=self.scale,
            dropout=self.attn_drop if self.training else 0.0,
            generator=self.generator,
            grid=layout if len(layout) == 2 else None,
        )

    def pattern(self, layout: tuple[int, ...]) -> Pattern:
        return Causal() if self.causal else Full(layout)

    def extra_repr(self) -> str:
        return f"{self.subsampling}, causal={self.causal}, num_heads={self.num_heads}"


@layers.register("subsampled")
def _subsampled(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    return SubsampledAttention(dim, num_heads, **options)  # type: ignore[arg-type]
