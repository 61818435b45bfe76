"""Attention in groups: O(N G) for every head, by folding the groups into the batch.

    (B, h, N, D) -> (B N/G, h, G, D),   o = softmax(scale q k^T) v, causal, in every group      q = [0, q],  k = [sinks, k]

Keys that all see are put before those of each group, with empty queries whose outputs are dropped: attention stays plain
causal attention over g + G tokens, for which every device has a fused kernel. Shifted heads differ in where the groups begin.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Causal
from heed.language.sinklora.patterns import HeadGroups, Segments


@provides("70-sinklora")
def grouped_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B G N D"],
    v: Float[Tensor, "B G N E"],
    groups: HeadGroups,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    size: int | None = None,
    causal: bool = True,
) -> Float[Tensor, "B H N E"]:
    """S2-Attn or SF-Attn of tokens that have their positions already.

    Args:
        q: (B, H, N, D).
        k, v: (B, G, N, D) and (B, G, N, E); G divides H. Heads of one key head may be shifted and not shifted.
        groups: what each head sees.
        scale: factor on q k^T, default D ** -0.5.
        dropout: on the weights.
        size: tokens in a group, in the place of what `groups` makes of N.
        causal: False lets tokens see their whole group, and the sinks everything.

    Returns:
        (B, H, N, E)

    Raises:
        ValueError: other keys than queries, or groups that do not divide the tokens where `groups` wants them to.
    """
    heads, tokens = q.shape[1:3]
    if k.shape[2] != tokens:
        raise ValueError(f"{tokens} queries and {k.shape[2]} keys must be the same tokens; decode with full attention")
    size = groups.group_size(tokens) if size is None else size
    outs, first = [], 0
    for segments, same in groupby(groups.segments(heads, size, causal)):
        last = first + len(list(same))
        queries = q[:, first:last]
        keys, values = (_heads(x, first, last, heads) for x in (k, v))
        if causal:
            outs.append(_folded(queries, keys, values, segments, groups.sinks, scale, dropout))
        else:
            outs.append(attend(queries, keys, values, groups.with_sinks(segments), scale=scale, dropout=dropout))
        first = last
    return torch.cat(outs, 1)


@provides("70-sinklora")
def visible_pairs(groups: HeadGroups, heads: int, tokens: int) -> list[int]:
    """How many pairs of a query and a key each head computes: about N (G / 2 + sinks), where dense attention has N^2 / 2."""
    runs = [_runs(segments, groups.sinks, tokens) for segments in groups.segments(heads, groups.group_size(tokens))]
    return [sum(run.pairs for run in of_head) for of_head in runs]


@dataclass(frozen=True)
class _Run:
    """Consecutive groups that are alike: `count` of them from token `start` on, of `length`, with `before` sinks before."""

    start: int
    count: int
    length: int
    before: int

    @property
    def pairs(self) -> int:
        return self.count * self.length * (self.length + 1 + 2 * self.before) // 2


def _runs(segments: Segments, sinks: int, tokens: int) -> list[_Run]:
    found, start = [], 0
    cuts = [(length, min(sinks, begin)) for begin, length in segments.cuts(tokens)]
    for (length, before), same in groupby(cuts):
        count = len(list(same))
        found.append(_Run(start, count, length, before))
        start += count * length
    return found


def _folded(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, sinks: int, scale: float | None, dropout: float
) -> Tensor:
    """Causal attention of heads with the same groups."""
    if segments.wrap:
        q, k, v = (x.roll(-segments.shift, 2) for x in (q, k, v))
    outs = []
    for run in _runs(segments, sinks, q.shape[2]):
        queries, keys, values = (_fold(x, run) for x in (q, k, v))
        if run.before:
            queries = torch.cat([queries.new_zeros(*queries.shape[:2], run.before, queries.shape[3]), queries], 2)
            keys, values = (
                torch.cat([x[:, :, : run.before].repeat_interleave(run.count, 0), own], 2)
                for x, own in ((k, keys), (v, values))
            )
        out = attend(queries, keys, values, Causal(), scale=scale, dropout=dropout)[:, :, run.before :]
        outs.append(out.unflatten(0, (-1, run.count)).transpose(1, 2).flatten(2, 3))
    out = torch.cat(outs, 2)
    return out.roll(segments.shift, 2) if segments.wrap else out


def _fold(x: Tensor, run: _Run) -> Tensor:
    """The tokens of a run (B, h, N, D) with its groups in the batch: (B count, h, length, D)."""
    part = x[:, :, run.start : run.start + run.count * run.length]
    return part.unflatten(2, (run.count, run.length)).transpose(1, 2).flatten(0, 1)


def _heads(x: Tensor, first: int, last: int, heads: int) -> Tensor:
    """Keys or values (B, G, N, D) of the query heads first..last of `heads`."""
    share = heads // x.shape[1]
    if first % share == 0 and last % share == 0:
        return x[:, first // share : last // share]
    return x.repeat_interleave(share, 1)[:, first:last]
