"""The two halves of neighborhood attention (card 13): windowed scores, and windowed mixing of values.

    logits[b, h, i, s] = q_i . k_{j(i, s)} + rpb[h, j(i, s) - i + w - 1]        (B, H, *L, prod(w) + M), no scale
    out[b, h, i]       = sum_s attn[b, h, i, s] v_{j(i, s)}                     (B, H, *L, dv)

j(i, s) is the key in slot s of the window of query i; slots run row-major over the window, keys ascending on each axis.
NAT, DiNAT and their kin use it for what lies in between: dropout, masks, the weights themselves. It is the interface of
NATTEN 0.17 (Hassani et al., arXiv 2403.04690), with heads first.

Both halves are products of a tile of queries with the keys its windows cover (the paper's "unfused GEMM"), from which
the slots are picked, so the windows of single queries are never gathered. Memory is linear in the tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.engine.bias import RelativeBias
from heed.engine.constants import kept
from heed.engine.patterns import Neighborhood
from heed.engine.plan import Tiles
from heed.engine.planner import plan_for
from heed.layers.natten.checks import (
    CausalPerAxis,
    PerAxis,
    check_extra_shape,
    check_rank,
    check_same,
    windows_on,
)


@provides("13-fna")
def na1d_qk(
    query: Float[Tensor, "B H N d"],
    key: Float[Tensor, "B H N d"],
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    additional_keys: Float[Tensor, "B H M d"] | None = None,
    is_causal: CausalPerAxis = False,
    rpb: Float[Tensor, "H w"] | None = None,
) -> Float[Tensor, "B H N slots"]:
    """The scores of every query with the keys of its window, on sequences. No scale is applied: scale the query.

    Args:
        query: (B, H, N, d).
        key: (B, H, N, d).
        kernel_size: keys per window and axis, >= 2; kernel_size * dilation must fit the axis.
        dilation: step between the keys of a window.
        additional_keys: (B, H, M, d) tokens that every query sees; they take the last M slots.
        is_causal: whether an axis looks back only; slots without a key hold -inf.
        rpb: (H, 2 * kernel_size - 1) bias by relative position, one such axis per axis of tokens; for odd windows
            without causal axes.

    Returns:
        logits (B, H, N, kernel_size + M); on more axes of tokens, the product of the kernel sizes + M.

    Raises:
        ValueError: shapes or settings that do not fit, with the axis and the numbers.
    """
    return _qk(1, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


@provides("13-fna")
def na2d_qk(
    query: Float[Tensor, "B H X Y d"],
    key: Float[Tensor, "B H X Y d"],
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    additional_keys: Float[Tensor, "B H M d"] | None = None,
    is_causal: CausalPerAxis = False,
    rpb: Float[Tensor, "H w0 w1"] | None = None,
) -> Float[Tensor, "B H X Y slots"]:
    """Windowed scores on grids (B, H, X, Y, d); arguments as in `na1d_qk`, one value for both axes or one each."""
    return _qk(2, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


@provides("13-fna")
def na3d_qk(
    query: Float[Tensor, "B H T X Y d"],
    key: Float[Tensor, "B H T X Y d"],
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    additional_keys: Float[Tensor, "B H M d"] | None = None,
    is_causal: CausalPerAxis = False,
    rpb: Float[Tensor, "H w0 w1 w2"] | None = None,
) -> Float[Tensor, "B H T X Y slots"]:
    """Windowed scores on volumes (B, H, T, X, Y, d); arguments as in `na1d_qk`, one value for all axes or one each."""
    return _qk(3, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


@provides("13-fna")
def na1d_av(
    attn: Float[Tensor, "B H N slots"],
    value: Float[Tensor, "B H N dv"],
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    additional_values: Float[Tensor, "B H M dv"] | None = None,
    is_causal: CausalPerAxis = False,
) -> Float[Tensor, "B H N dv"]:
    """The values of every window mixed by weights in the slots of `na1d_qk`, on sequences.

    Args:
        attn: (B, H, N, kernel_size + M) weights, usually a softmax of logits; slots without a key are ignored.
        value: (B, H, N, dv).
        kernel_size, dilation, is_causal: as in `na1d_qk`.
        additional_values: (B, H, M, dv) values of the additional keys.

    Returns:
        out (B, H, N, dv).

    Raises:
        ValueError: shapes or settings that do not fit, with the axis and the numbers.
    """
    return _av(1, attn, value, kernel_size, dilation, additional_values, is_causal)


@provides("13-fna")
def na2d_av(
    attn: Float[Tensor, "B H X Y slots"],
    value: Float[Tensor, "B H X Y dv"],
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    additional_values: Float[Tensor, "B H M dv"] | None = None,
    is_causal: CausalPerAxis = False,
) -> Float[Tensor, "B H X Y dv"]:
    """Windowed mixing on grids (B, H, X, Y, dv); arguments as in `na1d_av`."""
    return _av(2, attn, value, kernel_size, dilation, additional_values, is_causal)


@provides("13-fna")
def na3d_av(
    attn: Float[Tensor, "B H T X Y slots"],
    value: Float[Tensor, "B H T X Y dv"],
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    additional_values: Float[Tensor, "B H M dv"] | None = None,
    is_causal: CausalPerAxis = False,
) -> Float[Tensor, "B H T X Y dv"]:
    """Windowed mixing on volumes (B, H, T, X, Y, dv); arguments as in `na1d_av`."""
    return _av(3, attn, value, kernel_size, dilation, additional_values, is_causal)


@provides("13-fna")
def natten2dqkrpb(
    query: Float[Tensor, "B H X Y d"],
    key: Float[Tensor, "B H X Y d"],
    rpb: Float[Tensor, "H w0 w1"] | None,
    kernel_size: PerAxis,
    dilation: PerAxis,
) -> Float[Tensor, "B H X Y slots"]:
    """`na2d_qk` under the name and with the argument order that NAT and DiNAT code imports from old NATTEN.

    It can take the place of `natten2dqkrpb` in `transformers.models.dinat.modeling_dinat`. Version 5.23 of transformers
    passes (B, Y, X, H, d) by mistake: there, permute(0, 3, 2, 1, 4) query, key and `natten2dav`'s value first.
    """
    return _qk(2, query, key, kernel_size, dilation, None, False, rpb)


@provides("13-fna")
def natten2dav(
    attn: Float[Tensor, "B H X Y slots"],
    value: Float[Tensor, "B H X Y dv"],
    kernel_size: PerAxis,
    dilation: PerAxis,
) -> Float[Tensor, "B H X Y dv"]:
    """`na2d_av` under the name that NAT and DiNAT code imports from old NATTEN."""
    return _av(2, attn, value, kernel_size, dilation, None, False)


@dataclass(frozen=True, eq=False)
class _Slots:
    """T tiles of tq queries, the K keys each visits, and which of these fill the W slots of every query."""

    queries: Tensor  # (T * tq,) token; padding repeats the last one
    keys: Tensor  # (T * K,) token
    of_tile: Tensor  # (T,) which of the U tables below a tile uses
    column: Tensor  # (U, tq, W) key of the tile in each slot, 0 where there is none
    absent: Tensor | None  # (U, tq, W) slots without a key; None when there are none
    offsets: tuple[Tensor, ...]  # per axis (U, tq, W) relative position of the slot's key

    def take(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Rows of x (G, N, D) at the tokens of every tile: (G, T, tq or K, D)."""
        groups, n, width = x.shape
        rows = (torch.arange(groups, device=x.device)[:, None] * n + tokens).view(-1, 1)
        # An expanded index makes this, and the sum in its backward pass, work on whole rows.
        taken = x.reshape(-1, width).gather(0, rows.expand(-1, width))
        return taken.view(groups, len(self.of_tile), -1, width)

    def columns(self, groups: int) -> Tensor:
        """(G, T, tq, W) index into the keys of each tile."""
        return self.column[self.of_tile].expand(groups, -1, -1, -1)

    def blank(self) -> Tensor | None:
        """(T, tq, W) slots without a key."""
        return None if self.absent is None else self.absent[self.of_tile]


def _qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis,
    additional_keys: Tensor | None,
    is_causal: CausalPerAxis,
    rpb: Tensor | None,
) -> Tensor:
    for name, x in (("query", query), ("key", key)):
        check_rank(name, x, rank, "(batch, heads, *layout, width)")
    tokens = {a: f"tokens, axis {a - 2} of the layout" for a in range(2, rank + 2)}
    check_same("key", key, "query", query, {0: "batch", 1: "heads", **tokens, rank + 2: "width"})
    windows = windows_on(tuple(query.shape[2:-1]), kernel_size, 1, dilation, is_causal)
    if rpb is not None:
        _check_table(rpb, windows, query.shape[1])
    if additional_keys is not None:
        check_extra_shape("additional_keys", additional_keys, key, heads=1)
    q, k = (x.flatten(2, -2).flatten(0, 1) for x in (query, key))
    groups, where = _slots(windows, query.device)
    parts = []
    for group in groups:
        scores = group.take(q, group.queries) @ group.take(k, group.keys).mT  # (B * H, T, tq, K)
        logits = scores.gather(3, group.columns(len(q)))
        if rpb is not None:
            bias = RelativeBias(rpb.to(key.dtype)).at(list(group.offsets))[:, group.of_tile]  # (H, T, tq, W)
            logits = (logits.unflatten(0, query.shape[:2]) + bias).flatten(0, 1)
        blank = group.blank()
        parts.append((logits if blank is None else logits.masked_fill(blank, -torch.inf)).flatten(1, 2))
    logits = torch.cat(parts, 1).index_select(1, where).view(*query.shape[:-1], -1)
    if additional_keys is None:
        return logits
    extra = query.flatten(2, -2) @ additional_keys.mT
    return torch.cat([logits, extra.view(*query.shape[:-1], -1)], -1)


def _av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis,
    additional_values: Tensor | None,
    is_causal: CausalPerAxis,
) -> Tensor:
    for name, x, last in (("attn", attn, "slots"), ("value", value, "width")):
        check_rank(name, x, rank, f"(batch, heads, *layout, {last})")
    tokens = {a: f"tokens, axis {a - 2} of the layout" for a in range(2, rank + 2)}
    check_same("value", value, "attn", attn, {0: "batch", 1: "heads", **tokens})
    windows = windows_on(tuple(value.shape[2:-1]), kernel_size, 1, dilation, is_causal)
    extra = 0
    if additional_values is not None:
        check_extra_shape("additional_values", additional_values, value, heads=1)
        extra = additional_values.shape[2]
    inside = math.prod(windows.kernel)
    if attn.shape[-1] != inside + extra:
        raise ValueError(
            f"attn {tuple(attn.shape)} has {attn.shape[-1]} slots on axis {rank + 2}; kernel_size {windows.kernel} and "
            f"{extra} additional values make {inside + extra}"
        )
    weights, v = attn[..., :inside].flatten(2, -2).flatten(0, 1), value.flatten(2, -2).flatten(0, 1)
    groups, where = _slots(windows, value.device)
    parts = []
    for group in groups:
        own, blank = group.take(weights, group.queries), group.blank()
        if blank is not None:
            own = own.masked_fill(blank, 0.0)
        values = group.take(v, group.keys)
        spread = own.new_zeros(*own.shape[:3], values.shape[2])  # (B * H, T, tq, K)
        # Slots without a key all point to column 0, so weights are added there rather than written.
        parts.append((spread.scatter_add(3, group.columns(len(v)), own) @ values).flatten(1, 2))
    out = torch.cat(parts, 1).index_select(1, where).view(value.shape)
    if additional_values is None:
        return out
    return out + (attn[..., inside:].flatten(2, -2) @ additional_values).view(value.shape)


def _check_table(rpb: Tensor, windows: Neighborhood, heads: int) -> None:
    for a, (w, causal) in enumerate(zip(windows.kernel, windows.causal, strict=True)):
        if causal:
            raise ValueError(f"rpb is not defined on causal axes, and axis {a} is one (is_causal={windows.causal})")
        if w % 2 == 0:
            raise ValueError(f"rpb needs odd windows, and axis {a} has {w} (kernel_size={windows.kernel})")
    wanted = (heads, *(2 * w - 1 for w in windows.kernel))
    if rpb.shape != wanted:
        raise ValueError(f"rpb {tuple(rpb.shape)} must be {wanted}: heads, then 2 * kernel_size - 1 per axis")


@torch.compiler.disable(reason="the plan's tiles depend on values; the compiler goes on after them")
@kept
def _slots(windows: Neighborhood, device: torch.device) -> tuple[tuple[_Slots, ...], Tensor]:
    """The plan's tiles with their slots, and (N,) the row of every token among the tiles' rows."""
    n = math.prod(windows.grid)
    plan = plan_for(windows, n, n, device)
    rows = torch.cat([group.queries.flatten() for group in plan.groups])
    where = torch.empty(n + 1, dtype=torch.long, device=device)  # padding writes to the last entry
    where[rows] = torch.arange(len(rows), device=device)
    return tuple(_slots_of(group, windows, n) for group in plan.groups), where[:n]


def _slots_of(group: Tiles, windows: Neighborhood, n: int) -> _Slots:
    assert group.offsets is not None  # patterns with axes have them
    shape = group.offsets[0].shape  # (U, tq, K)
    seen = torch.ones(shape, dtype=torch.bool, device=group.keys.device) if group.mask is None else group.mask == 0
    slot = torch.zeros(shape, dtype=torch.long, device=group.keys.device)
    for offset, w in zip(group.offsets, windows.kernel, strict=True):
        first = offset.masked_fill(~seen, n).amin(2, keepdim=True)  # the windows are boxes
        slot = slot * w + offset - first
    inside = math.prod(windows.kernel)
    slot = slot.masked_fill(~seen, inside)  # a spare slot takes the keys outside the window
    column = torch.full((*shape[:2], inside + 1), -1, device=group.keys.device)
    column.scatter_(2, slot, torch.arange(shape[2], device=group.keys.device).expand(shape))
    column = column[..., :inside]
    absent, column = column < 0, column.clamp(min=0)
    return _Slots(
        group.queries.flatten().clamp(max=n - 1),
        group.keys.flatten(),
        group.mask_of[0, :, 0],
        column,
        absent if absent.any() else None,
        tuple(offset.gather(2, column) for offset in group.offsets),
    )
