"""Additive biases of the scores: a plain tensor, a relative table, or relative logits that depend on the query.

A bias on relative positions is indexed by key place - anchor of the query + centre along each axis of the pattern
(`heed.engine.axis`). In dilated neighborhoods places count in dilation steps, which is what NATTEN's tables expect.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heed.engine.axis import Axis
from heed.engine.pattern import Pattern


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """A learned table per head: bias[h, i, j] = table[h, offset_0(i, j), offset_1(i, j), ...].

    Args:
        table: (H or 1, 2 * w_0 - 1, ...) one entry per head and relative offset; offset 0 lies in the middle.
    """

    table: Tensor

    def check(self, rank: int) -> None:
        if self.table.ndim != rank + 1:
            raise ValueError(f"RelativeBias: table {tuple(self.table.shape)} does not fit a pattern of {rank} axes")
        for a, entries in enumerate(self.table.shape[1:]):
            if entries % 2 == 0:
                raise ValueError(f"RelativeBias: axis {a} has {entries} entries; 2 * window - 1 is odd")

    def at(self, offsets: list[Tensor]) -> Tensor:
        """Values (H or 1, *shape) at relative offsets, one integer tensor of the same shape per axis."""
        places = [
            (offset + entries // 2).clamp(0, entries - 1)
            for offset, entries in zip(offsets, self.table.shape[1:], strict=True)
        ]
        # In float32, since the gradient of an entry is a sum over all pairs at its offset.
        table = self.table.to(torch.promote_types(self.table.dtype, torch.float32))
        return table[(slice(None), *places)]


@dataclass(frozen=True, eq=False)
class RelativeLogits:
    """Relative position logits that depend on the query, summed over axes: bias = sum_a logits_a[b, h, i, offset_a(i, j)].

    Args:
        logits: one tensor (B, H, N, entries_a) per axis of the pattern, usually queries times a table of embeddings.
        centre: index of offset 0 on each axis.
    """

    logits: tuple[Tensor, ...]
    centre: tuple[int, ...]

    def check(self, rank: int) -> None:
        if not len(self.logits) == len(self.centre) == rank:
            raise ValueError(f"RelativeLogits: {len(self.logits)} logits for a pattern of {rank} axes")


Bias = Tensor | RelativeBias | RelativeLogits


def axes_for(bias: RelativeBias | RelativeLogits, pattern: Pattern, n: int, m: int) -> tuple[Axis, ...]:
    """The pattern's axes, checked against the bias."""
    axes = pattern.axes(n, m)
    if axes is None:
        raise ValueError(
            f"{type(bias).__name__} needs a pattern with axes; {pattern} has none, pass a dense tensor instead"
        )
    bias.check(len(axes))
    return axes


def dense_bias(bias: Bias, pattern: Pattern, n: int, m: int) -> Tensor:
    """The bias as a tensor that broadcasts to (B, H, n, m); values where the pattern keeps nothing are arbitrary."""
    if isinstance(bias, Tensor):
        return bias
    device = bias.table.device if isinstance(bias, RelativeBias) else bias.logits[0].device
    tables = token_offsets(axes_for(bias, pattern, n, m), n, m, device)
    offsets = [place[None, :] - anchor[:, None] for anchor, place in tables]
    if isinstance(bias, RelativeBias):
        return bias.at(offsets).unsqueeze(0)
    total = None
    for logits, centre, offset in zip(bias.logits, bias.centre, offsets, strict=True):
        places = (offset + centre).clamp(0, logits.shape[-1] - 1).expand(*logits.shape[:2], n, m)
        value = logits.gather(3, places)
        total = value if total is None else total + value
    assert total is not None
    return total


def token_offsets(axes: tuple[Axis, ...], n: int, m: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Per axis the anchor (n,) of every query and the place (m,) of every key; their difference is the offset."""
    q, k = torch.arange(n), torch.arange(m)
    tables: list[tuple[Tensor, Tensor]] = []
    for axis in reversed(axes):
        anchor = axis.anchors()[axis.query_places()[q % axis.queries]]
        place = axis.key_places()[k % axis.keys]
        tables.append((anchor.to(device), place.to(device)))
        q, k = q // axis.queries, k // axis.keys
    return tables[::-1]
