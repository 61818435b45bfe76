"""Attention to a random part of the sources, given the draw: the four rules of stochastically subsampled attention (card 41).

    Sources      out_i = softmax(q_i k_S^T / sqrt(d)) v_S                 one subset S for all targets and heads
    Blocks       out_i = the same over the block that i fell into          places argsort(i + sigma eps_i), cut every w
    Connections  pairs (i, j, head) drop out independently                 a regulariser: nothing is saved
    Dropped      sources drop out independently, for all targets           a regulariser: nothing is saved

Kept weights are not scaled up: the softmax over what is kept sums to one by itself. Keys and values are gathered before
the products, so that N x S scores are computed instead of N x N. A causal target sees the kept sources before it, and
itself. Hussain et al., "The Information Pathways Hypothesis", KDD 2023 (arXiv 2306.01705); its code was not released:
`Sources` and `Blocks` follow the paper's words, and cutting the shuffled sequence into blocks is heed's own reading.
`Connections` and `Dropped` are what the authors' graph transformers do (egt_pytorch, tgt).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Causal, Full

# Causal targets are cut into tiles; a tile's own tokens are beside the sources before it, so tiles stay below S.
_TILE, _LEAST_TILE = 256, 16


@dataclass(frozen=True, eq=False)
class Draw(ABC):
    """What was drawn for one layer and step."""

    def attend(
        self,
        q: Float[Tensor, "B H N D"],
        k: Float[Tensor, "B G M D"],
        v: Float[Tensor, "B G M E"],
        *,
        causal: bool = False,
        mask: Tensor | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> Float[Tensor, "B H N E"]:
        """Attention under the draw.

        Args:
            q: (B, H, N, D) queries of the targets, rotated where the model rotates.
            k, v: (B, G, M, D or E) of the sources; G divides H.
            causal: a target sees sources up to its own index in the text.
            mask: True where attention is allowed, or what is added to the scores; broadcasts to (B, H, N, M).
            scale: factor on q k^T, default D ** -0.5.
            dropout: on the weights.

        Raises:
            ValueError: cross-attention that is causal, a mask that does not fit, or a draw for other tokens.
        """
        n, m = q.shape[2], k.shape[2]
        if causal and n != m:
            raise ValueError(
                f"causal attention of {n} targets to {m} sources: cross-attention has no order; causal=False"
            )
        if mask is not None:
            _check_mask(mask, (len(q), q.shape[1], n, m))
        self.check(n, m)
        return self.run(q, k, v, causal, mask, {"scale": scale, "dropout": dropout})

    @abstractmethod
    def check(self, targets: int, sources: int) -> None:
        """ValueError when the draw is for other numbers of tokens."""

    @abstractmethod
    def run(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, options: dict[str, float | None]
    ) -> Tensor:
        """`attend`, checked."""

    @abstractmethod
    def kept(self, targets: int, sources: int, causal: bool = False) -> Bool[Tensor, "#B #H N M"]:
        """The pairs that are kept, as a dense mask: for pictures, counts and tests."""


@provides("41-subsampled-ssa")
@dataclass(frozen=True, eq=False)
class Sources(Draw):
    """A subset of the sources, the same for all targets and heads ("unbiased").

    Args:
        index: (B, S), or (1, S) for one subset that the whole batch shares.
    """

    index: Int[Tensor, "b S"]

    def check(self, targets: int, sources: int) -> None:
        highest = int(self.index.max())
        if highest >= sources:
            raise ValueError(f"the draw names source {highest}, but there are {sources}")

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, options: dict[str, float | None]
    ) -> Tensor:
        if causal:
            return self._causal(q, k, v, mask, options)
        columns = None if mask is None else _columns(mask, self.index)
        return _attend(q, _take(k, self.index), _take(v, self.index), columns, options)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, float | None]) -> Tensor:
        """In tiles of targets: a tile computes scores with the sources before its end, and with its own tokens."""
        index = self.index.sort(-1).values  # so that what lies before a target is a prefix
        n, count = q.shape[2], index.shape[1]
        tile = max(_LEAST_TILE, min(_TILE, count // 2))
        ks, vs = _take(k, index), _take(v, index)
        outputs = []
        for begin in range(0, n, tile):
            own = slice(begin, min(begin + tile, n))
            target = torch.arange(own.start, own.stop, device=q.device)
            before = int((index < own.stop - 1).sum(-1).max())
            # The target itself is seen once, as an own token, whether it was drawn or not.
            allowed = torch.cat(
                [
                    index[:, None, :before] < target[:, None],
                    torch.eye(len(target), dtype=torch.bool, device=q.device).expand(len(index), -1, -1),
                ],
                -1,
            )[:, None]
            if mask is not None:
                rows = mask if mask.shape[-2] == 1 else mask[..., own, :]
                seen = torch.cat([index[:, :before], target.expand(len(index), -1)], -1)
                allowed = _both(_columns(rows, seen), allowed)
            keys, values = (torch.cat([xs[:, :, :before], x[:, :, own]], 2) for xs, x in ((ks, k), (vs, v)))
            outputs.append(_attend(q[:, :, own], keys, values, allowed, options))
        return torch.cat(outputs, 2)

    def kept(self, targets: int, sources: int, causal: bool = False) -> Bool[Tensor, "#B #H N M"]:
        chosen = torch.zeros(len(self.index), sources, dtype=torch.bool).scatter_(1, self.index.cpu().long(), True)
        kept = chosen[:, None, None].expand(-1, 1, targets, -1)
        if causal:
            kept = (kept | torch.eye(targets, dtype=torch.bool)) & torch.ones_like(kept).tril()
        return kept


@provides("41-subsampled-ssa")
@dataclass(frozen=True, eq=False)
class Blocks(Draw):
    """A noisy shuffle cut into blocks: a target sees its own block, itself included ("local").

    Args:
        order: (B, N) or (1, N), the shuffled tokens; prefix tokens are not among them.
        window: w, tokens per block; the last block may have fewer.
        prefix: first tokens (class token, registers) that are sources for every target, and see all sources themselves;
            not with causal attention.
    """

    order: Int[Tensor, "b N"]
    window: int
    prefix: int = 0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")
        if self.prefix < 0:
            raise ValueError(f"prefix={self.prefix} must be >= 0")

    def check(self, targets: int, sources: int) -> None:
        if targets != sources:
            raise ValueError(f"blocks are of one sequence, not of {targets} targets and {sources} sources")
        if self.order.shape[1] + self.prefix != targets:
            raise ValueError(
                f"the draw orders {self.order.shape[1]} tokens beside {self.prefix} prefix tokens; there are {targets}"
            )

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, options: dict[str, float | None]
    ) -> Tensor:
        if causal and self.prefix:
            raise ValueError(f"prefix={self.prefix}: causal attention has no tokens that all others see; prefix=0")
        order, full = self.order.long(), self.order.shape[1] // self.window * self.window
        places, outputs = [], []
        for part, width in ((order[:, :full], self.window), (order[:, full:], self.order.shape[1] - full)):
            if part.shape[1]:
                # Within a block the order does not matter; in the text's own, causality is the plain lower triangle.
                blocks = part.unflatten(1, (-1, width)).sort(-1).values
                places.append(blocks.flatten(1))
                outputs.append(self._blocks(q, k, v, blocks, causal, mask, options))
        if self.prefix:
            first = torch.arange(self.prefix, device=order.device)
            places.insert(0, first.expand(len(order), -1))
            rows = mask if mask is None or mask.shape[-2] == 1 else mask[..., : self.prefix, :]
            outputs.insert(0, _attend(q[:, :, : self.prefix], k, v, rows, options))
        back = torch.cat(places, 1).argsort(-1)
        return _take(torch.cat(outputs, 2), back)

    def _blocks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Tensor,
        causal: bool,
        mask: Tensor | None,
        options: dict[str, float | None],
    ) -> Tensor:
        """Attention of blocks (b, n, w), which become batch elements: (B, H, n w, E)."""
        batch, (_, number, width) = len(q), blocks.shape
        keys = blocks
        if self.prefix:
            first = torch.arange(self.prefix, device=blocks.device).expand(len(blocks), number, -1)
            keys = torch.cat([first, blocks], -1)

        def fold(x: Tensor, index: Tensor) -> Tensor:
            return _take(x, index.flatten(1)).unflatten(2, (number, -1)).transpose(1, 2).flatten(0, 1)

        pairs = None if mask is None else _block_pairs(mask, blocks, keys, batch)
        out = _attend(fold(q, blocks), fold(k, keys), fold(v, keys), pairs, options, causal)
        return out.unflatten(0, (batch, number)).transpose(1, 2).reshape(batch, q.shape[1], number * width, -1)

    def kept(self, targets: int, sources: int, causal: bool = False) -> Bool[Tensor, "#B #H N M"]:
        order = self.order.cpu().long()
        block = torch.arange(order.shape[1]) // self.window
        label = torch.empty_like(order).scatter_(1, order - self.prefix, block.expand_as(order))
        kept = torch.ones(len(order), targets, sources, dtype=torch.bool)
        kept[:, self.prefix :, self.prefix :] = label[:, :, None] == label[:, None]
        return (kept.tril() if causal else kept)[:, None]


@provides("41-subsampled-ssa")
@dataclass(frozen=True, eq=False)
class Connections(Draw):
    """Single connections drop out; a target that would lose all of them keeps all ("connection", authors' EGT).

    Args:
        dropped: (B, H, N, M) bool, each axis but the last two may be 1.
    """

    dropped: Bool[Tensor, "b h N M"]

    def check(self, targets: int, sources: int) -> None:
        if self.dropped.shape[-2:] != (targets, sources):
            raise ValueError(f"the draw is for {tuple(self.dropped.shape[-2:])} pairs, not {(targets, sources)}")

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, options: dict[str, float | None]
    ) -> Tensor:
        allowed = ~self.dropped
        visible = torch.ones_like(allowed).tril() if causal else torch.ones_like(allowed)
        if mask is not None:
            visible = visible & _allowed(mask)
        left = allowed & visible
        left = torch.where(left.any(-1, keepdim=True), left, visible)
        return _attend(q, k, v, left if mask is None else _both(mask, left), options)

    def kept(self, targets: int, sources: int, causal: bool = False) -> Bool[Tensor, "#B #H N M"]:
        visible = torch.ones_like(self.dropped).tril() if causal else torch.ones_like(self.dropped)
        left = ~self.dropped & visible
        return torch.where(left.any(-1, keepdim=True), left, visible).cpu()


@provides("41-subsampled-ssa")
@dataclass(frozen=True, eq=False)
class Dropped(Draw):
    """Sources drop out, for all targets and heads ("source_dropout", authors' TGT); a causal target keeps itself.

    Args:
        dropped: (B, M) or (1, M) bool. A row that drops everything keeps its first source (authors': NaN).
    """

    dropped: Bool[Tensor, "b M"]

    def check(self, targets: int, sources: int) -> None:
        if self.dropped.shape[1] != sources:
            raise ValueError(f"the draw is for {self.dropped.shape[1]} sources, not {sources}")

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, options: dict[str, float | None]
    ) -> Tensor:
        left = self._left(q.shape[2], causal)
        return _attend(q, k, v, left if mask is None else _both(mask, left), options)

    def _left(self, targets: int, causal: bool) -> Tensor:
        first = torch.arange(self.dropped.shape[1], device=self.dropped.device) == 0
        left = (~self.dropped | (self.dropped.all(-1, keepdim=True) & first))[:, None, None]
        if not causal:
            return left
        own = torch.eye(targets, dtype=torch.bool, device=left.device)
        return (left | own) & torch.ones_like(own).tril()

    def kept(self, targets: int, sources: int, causal: bool = False) -> Bool[Tensor, "#B #H N M"]:
        return self._left(targets, causal).expand(-1, -1, targets, -1).cpu()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, float | None], causal: bool = False
) -> Tensor:
    """The engine's attention under a boolean or additive mask."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(~mask, -torch.inf)
    pattern = Causal() if causal else Full()
    return attend(q, k, v, pattern, bias=mask, **options)  # type: ignore[arg-type]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (B, H, N, D): those of index (B or 1, S)."""
    if len(index) == 1:
        return x.index_select(2, index[0].long())
    return x.take_along_dim(index.long()[:, None, :, None], 2)


def _columns(mask: Tensor, index: Tensor) -> Tensor:
    """Columns of a mask (..., M): those of index (B or 1, S)."""
    mask = mask.view((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[-1] == 1:
        return mask
    return mask.take_along_dim(index.long()[:, None, None], -1)


def _block_pairs(mask: Tensor, blocks: Tensor, keys: Tensor, batch: int) -> Tensor:
    """(batch * n, h, w, keys of a block) entries of a mask at the pairs of blocks (b, n, w)."""
    mask = mask.view((1,) * (4 - mask.ndim) + mask.shape)
    row, column = blocks[..., None], keys[:, :, None]
    # An axis of size 1 holds for all: its index is 0.
    b = torch.arange(batch, device=mask.device)[:, None, None, None] % len(mask)
    row, column = row % mask.shape[2], column % mask.shape[3]
    return mask.movedim(1, -1)[b, row, column].movedim(-1, 2).flatten(0, 1)


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _both(mask: Tensor, allowed: Tensor) -> Tensor:
    """A mask of any kind and one of bool as one."""
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)


def _check_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    try:
        fits = torch.broadcast_shapes(mask.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to {shape} (batch, heads, targets, sources)")
