"""What the other heads keep: the first tokens, the last ones, and one token that stands for all that were dropped.

    L = max(window, floor(N / divisor))              of N tokens the first `sinks` and the last L stay; D are the rest
    k_c = mean of k_j,  v_c = mean of v_j,  j in D    keys are rotated already, and are not rotated again
    N_d = |D|                                        more tokens join:  k_c <- (N_d k_c + sum k) / (N_d + n)

    columns = [compensation token, sinks, last tokens]                                       (B, g, M, D)

Every row of the batch has its own N, padding left out; where a row has fewer columns than the longest, some are empty. Means
are kept in float32, so that those of thousands of tokens grow without loss. Tang et al., "RazorAttention: Efficient KV Cache
Compression Through Retrieval Heads", ICLR 2025, arXiv 2407.15891, equation 4 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heed.catalogue import provides
from heed.language.caches.storage import storage_nbytes

EMPTY = -1  # position of a column that holds no token


@dataclass(frozen=True)
class Budget:
    """How much a head keeps of N tokens.

    Args:
        sinks: the first tokens.
        window: the last tokens, at least.
        divisor: N / divisor of the last tokens, if that is more; None for `window` at any length.
        compensate: keep the mean of what is dropped.
    """

    sinks: int
    window: int
    divisor: float | None
    compensate: bool = True

    def last(self, tokens: Int[Tensor, " *B"]) -> Int[Tensor, " *B"]:
        """L for each N."""
        window = torch.full_like(tokens, self.window)
        return window if self.divisor is None else torch.maximum(window, (tokens / self.divisor).floor().long())

    def kept(self, tokens: int) -> int:
        """Columns after a prompt of N tokens, the compensation token included."""
        last = int(self.last(torch.tensor(tokens)))
        return tokens if self.sinks + last >= tokens else self.sinks + last + self.compensate


@provides("65-razor")
@dataclass(frozen=True)
class WindowStore:
    """Keys and values of some heads of a layer; `WindowStore.empty` is the first of them.

    Attributes:
        keys, values: (B, g, M, D), the compensation token first where there is one.
        at: (B, M) int32, positions of the columns' tokens, padding counted; -1 for an empty column. The compensation token
            has that of the first token which it stands for.
        dropped: (B,), N_d of each row.
        mean_keys, mean_values: (B, g, D) k_c and v_c in float32; None where no row has any.
        ragged: some column may be empty.
    """

    keys: Float[Tensor, "B g M D"]
    values: Float[Tensor, "B g M E"]
    at: Int[Tensor, "B M"]
    dropped: Int[Tensor, " B"]
    mean_keys: Float[Tensor, "B g D"] | None = None
    mean_values: Float[Tensor, "B g E"] | None = None
    ragged: bool = False

    @classmethod
    def empty(cls, keys: Float[Tensor, "B g N D"], values: Float[Tensor, "B g N E"]) -> WindowStore:
        """No tokens yet, for keys and values such as these."""
        batch, device = len(keys), keys.device
        at = torch.empty(batch, 0, dtype=torch.int32, device=device)
        return cls(
            keys[:, :, :0].clone(), values[:, :, :0].clone(), at, torch.zeros(batch, dtype=torch.long, device=device)
        )

    @property
    def extra(self) -> int:
        """1 where the first column is the compensation token."""
        return int(self.mean_keys is not None)

    def append(self, keys: Tensor, values: Tensor, begin: int, real: Bool[Tensor, "B N"] | None = None) -> WindowStore:
        """Take in new tokens.

        Args:
            keys, values: (B, g, N, D).
            begin: position of the first.
            real: (B, N), False for padding; None for none.
        """
        batch, tokens = len(keys), keys.shape[2]
        at = torch.arange(begin, begin + tokens, dtype=torch.int32, device=keys.device).expand(batch, -1)
        if real is not None:
            at = at.masked_fill(~real, EMPTY)
        return replace(
            self,
            keys=torch.cat([self.keys, keys], 2),
            values=torch.cat([self.values, values], 2),
            at=torch.cat([self.at, at], 1),
            ragged=self.ragged or real is not None,
        )

    def compress(self, budget: Budget) -> WindowStore:
        """Drop what lies between the sinks and the last tokens, into the mean."""
        keys, values, at = self.keys[:, :, self.extra :], self.values[:, :, self.extra :], self.at[:, self.extra :]
        held = at >= 0
        count = held.sum(1)
        excess = (count - budget.sinks - budget.last(count + self.dropped)).clamp(min=0)
        most = int(excess.max())
        if most == 0:
            return self
        rank = held.cumsum(1) - 1  # of a token among those of its row
        leaves = held & (rank >= budget.sinks) & (rank < budget.sinks + excess[:, None])
        dropped = self.dropped + excess
        # The columns that stay, in order and then, in rows that have fewer, any others.
        width = int((count - excess).max())
        order = (~(held & ~leaves)).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        filled = torch.arange(width, device=at.device) < (count - excess)[:, None]
        new = replace(
            self,
            keys=_pick(keys, order),
            values=_pick(values, order),
            at=at.gather(1, order).masked_fill(~filled, EMPTY),
            dropped=dropped,
            ragged=not bool(filled.all()),
        )
        if not budget.compensate:
            return new
        first = at.masked_fill(~leaves, torch.iinfo(at.dtype).max).amin(1)
        if self.extra:
            first = torch.where(self.dropped > 0, self.at[:, 0], first)
        first = first.masked_fill(dropped == 0, EMPTY)
        mean_keys = _joined(self.mean_keys, self.dropped, keys, leaves, dropped)
        mean_values = _joined(self.mean_values, self.dropped, values, leaves, dropped)
        return replace(
            new,
            keys=torch.cat([mean_keys[:, :, None].to(keys.dtype), new.keys], 2),
            values=torch.cat([mean_values[:, :, None].to(values.dtype), new.values], 2),
            at=torch.cat([first[:, None], new.at], 1),
            mean_keys=mean_keys,
            mean_values=mean_values,
            ragged=new.ragged or bool((dropped == 0).any()),
        )

    def crop(self, seen: int, sinks: int) -> WindowStore | None:
        """Only the tokens before position `seen`; None where a dropped one lies after it."""
        at = self.at[:, self.extra :]
        has_dropped = self.dropped > 0
        oldest = at[:, sinks : sinks + 1]  # of the last tokens, where some were dropped
        if bool(has_dropped.any()) and (
            oldest.shape[1] == 0 or bool((((oldest < 0) | (oldest > seen))[:, 0] & has_dropped).any())
        ):
            return None
        stays = self.at < seen
        width = int((stays & (self.at >= 0)).any(0).nonzero().max()) + 1 if bool((self.at >= 0).any()) else 0
        at = self.at.masked_fill(~stays, EMPTY)[:, :width].clone()
        cut = (x[:, :, :width].clone() for x in (self.keys, self.values))
        return replace(self, keys=next(cut), values=next(cut), at=at, ragged=bool((at < 0).any()))

    def parts(self) -> dict[str, int]:
        """Bytes of the keys and values, of the means in float32, and of the positions and counts."""
        return {
            "other heads": storage_nbytes([self.keys, self.values]),
            "means": storage_nbytes([self.mean_keys, self.mean_values]),
            "positions": storage_nbytes([self.at, self.dropped]),
        }


def _pick(x: Float[Tensor, "B g M D"], order: Int[Tensor, "B W"]) -> Float[Tensor, "B g W D"]:
    """Columns of every row; whole tokens are copied at a time, which `gather` does not do."""
    return torch.stack([row.index_select(1, some) for row, some in zip(x, order, strict=True)])


def _joined(mean: Tensor | None, old: Tensor, x: Tensor, leaves: Tensor, new: Tensor) -> Tensor:
    """The mean (B, g, D) of what it stood for, `old` tokens, and of those of x that leave: `new` tokens in all."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.masked_fill(~leaves[:, None, :, None], 0).sum(2, dtype=dtype)
    if mean is not None:
        total = total + mean * old[:, None, None]
    return total / new.clamp(min=1)[:, None, None]
