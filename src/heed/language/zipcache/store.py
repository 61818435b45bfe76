"""Keys or values in two precisions: the salient tokens of every head in one packed table, the regular ones in another.

    row i of a table = [i-th listed token of head 1, ..., of head G]          (n, C), C = G D

Salient tokens are listed by position, regular ones by saliency, so that the tokens of one row, which share a step per token,
are alike. Only the regular list is stored; the salient one is what it leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heed.catalogue import provides
from heed.language.quantise import Grouping, Quantised, channel_scale, quantise


@dataclass(frozen=True)
class Precision:
    """How keys or values are quantised.

    Args:
        salient_bits, regular_bits: 2, 4 or 8.
        per: what shares a step, see `heed.language.quantise.quantise`.
        group: channels of a group.
        shared: parameters of a channel for the whole batch.
    """

    salient_bits: int
    regular_bits: int
    per: Grouping
    group: int = 32
    shared: bool = False


@provides("34-zipcache")
@dataclass(frozen=True)
class MixedStore:
    """Keys or values of N tokens; `MixedStore.of` quantises them.

    Attributes:
        salient, regular: the two tables; None where there are no such tokens.
        ids: (B, G, r) int16 or int32, positions of the regular tokens in the order of the table; -1 for none.
        tokens: (B, N), False for padding, which is not stored and comes back as 0; None without padding.
        heads, length: G and N.
    """

    salient: Quantised | None
    regular: Quantised | None
    ids: Int[Tensor, "B G r"]
    tokens: Bool[Tensor, "B N"] | None
    heads: int
    length: int

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "B G N D"],
        ids: Int[Tensor, "B G r"],
        precision: Precision,
        tokens: Bool[Tensor, "B N"] | None = None,
    ) -> MixedStore:
        """Quantise keys or values (B, G, N, D), the tokens in `ids` as regular ones."""
        heads, length = x.shape[1:3]
        empty = cls(None, None, ids, tokens, heads, length)
        scale = None
        if precision.per == "channel-separable":  # one for both tables
            scale = channel_scale(_rows(x), tokens=tokens, shared=precision.shared)

        def table(chosen: Tensor, bits: int) -> Quantised | None:
            if chosen.shape[-1] == 0:
                return None
            real = chosen[:, 0] >= 0
            rows = _rows(_pick(x.transpose(1, 2), chosen.clamp(min=0)))
            padded = None if tokens is None else real
            return quantise(
                rows, bits, precision.per, group=precision.group, scale=scale, tokens=padded, shared=precision.shared
            )

        return MixedStore(
            table(empty.salient_ids(), precision.salient_bits),
            table(ids, precision.regular_bits),
            ids,
            tokens,
            heads,
            length,
        )

    def salient_ids(self) -> Int[Tensor, "B G s"]:
        """Positions of the salient tokens of every head, ascending; -1 for none."""
        kept = self._salient()
        counts = kept.sum(-1, keepdim=True)
        order = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(counts.max())]
        return order.masked_fill(torch.arange(order.shape[-1], device=order.device) >= counts, -1)

    def dequantise(self) -> Float[Tensor, "B G N D"]:
        """All tokens in their order, approximately as they were."""
        tables = [table.dequantise() for table in (self.salient, self.regular) if table is not None]
        rows = torch.cat(tables, 1).unflatten(-1, (self.heads, -1))
        # The row of the two tables, one after the other, in which each token lies.
        first = 0 if self.salient is None else self.salient.packed.shape[1]
        regular = torch.arange(first, rows.shape[1], device=rows.device).expand(self.ids.shape)
        place = _scatter(self._salient().cumsum(-1) - 1, self.ids, regular)
        x = _pick(rows, place.clamp(min=0))
        return x if self.tokens is None else x.masked_fill(~self.tokens[:, None, :, None], 0)

    def _salient(self) -> Bool[Tensor, "B G N"]:
        kept = torch.ones(*self.ids.shape[:2], self.length, dtype=torch.bool, device=self.ids.device)
        kept = _scatter(kept, self.ids, torch.zeros_like(self.ids, dtype=torch.bool))
        return kept if self.tokens is None else kept & self.tokens[:, None]


def _rows(x: Float[Tensor, "B G N D"]) -> Float[Tensor, "B N C"]:
    """Heads side by side: channel h D + c."""
    return x.transpose(1, 2).flatten(2)


def _pick(rows: Float[Tensor, "B n G D"], at: Int[Tensor, "B G N"]) -> Float[Tensor, "B G N D"]:
    """Of every head, the rows at the places given for it; copies whole rows, which `gather` does not."""
    batch, number, heads, _ = rows.shape
    starts = torch.arange(batch, device=at.device)[:, None, None] * number
    flat = (starts + at) * heads + torch.arange(heads, device=at.device)[:, None]
    return rows.reshape(batch * number * heads, -1).index_select(0, flat.flatten()).view(*at.shape, -1)


def _scatter(x: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """x (B, G, N) with values (B, G, r) at ids; -1 is nowhere."""
    wider = torch.cat([x, x[..., :1]], -1)  # one more place, for those that go nowhere
    at = torch.where(ids < 0, x.shape[-1], ids.long())
    return wider.scatter(-1, at, values.to(x.dtype))[..., :-1]
