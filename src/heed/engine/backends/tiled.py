"""Attention by tiles in plain PyTorch: sparse forward and backward on any device, without compiler or extension."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from heed.engine.backends.tiles import tiled_attention
from heed.engine.bias import RelativeBias, RelativeLogits, axes_for
from heed.engine.call import Call, Result
from heed.engine.patterns import Grouped
from heed.engine.plan import Plan, Tiles
from heed.engine.planner import plan_for


def refuse(call: Call) -> str | None:
    if call.weights:
        return "it never forms the weights; use backend='reference'"
    return None


def run(call: Call) -> Result:
    if isinstance(call.pattern, Grouped) and not call.pattern.static:
        return _run_sorted(call)
    return _run_plan(call)


def _run_plan(call: Call) -> Result:
    batch, heads = call.q.shape[:2]
    plan = plan_for(call.pattern, call.n, call.m, call.q.device, batch, heads)
    block = max(group.key_block for group in plan.groups)
    k, v = (F.pad(x, (0, 0, 0, -call.m % block)) if call.m % block else x for x in (call.k, call.v))
    key_bias = None
    if call.key_mask is not None:
        key_bias = torch.zeros(batch, k.shape[2], dtype=torch.float32, device=k.device)
        key_bias[:, : call.m].masked_fill_(~call.key_mask, -torch.inf)
        plan = replace(plan, empty=True)
    elif isinstance(call.bias, Tensor):
        plan = replace(plan, empty=True)  # a bias may hold -inf
    tables, table_of = zip(*(_table(call, plan, group) for group in plan.groups), strict=True)
    seed = 0
    if call.dropout > 0:
        device = "cpu" if call.generator is None else call.generator.device
        seed = int(torch.randint(2**48, (), generator=call.generator, device=device))
    out, lse = tiled_attention(
        plan,
        call.q.flatten(0, 1).contiguous(),
        k.flatten(0, 1).contiguous(),
        v.flatten(0, 1).contiguous(),
        list(tables),
        list(table_of),
        key_bias,
        call.scale,
        call.dropout,
        seed,
        call.lse,
    )
    shape = (batch, heads, call.n)
    return Result(out.view(*shape, -1), lse=lse.view(shape) if call.lse else None)


def _run_sorted(call: Call) -> Result:
    """Groups chosen by content: sort the tokens by label, so that a tile's keys lie together, and sort back."""
    assert isinstance(call.pattern, Grouped)  # checked by the caller
    if isinstance(call.bias, RelativeBias | RelativeLogits):
        axes_for(call.bias, call.pattern, call.n, call.m)  # says that such groups have no axes
    batch, heads = call.q.shape[:2]
    labels = call.pattern.labels.to(call.q.device).expand(batch, heads, -1)
    key_labels = call.pattern.keys.to(call.q.device).expand(batch, heads, -1)
    query_order, key_order = labels.argsort(stable=True), key_labels.argsort(stable=True)
    k, v = call.full_heads()
    bias = call.bias
    if isinstance(bias, Tensor):
        full = bias.expand(batch, heads, call.n, call.m)
        bias = full.take_along_dim(query_order[..., None], 2).take_along_dim(key_order[:, :, None, :], 3)
    key_bias = call.key_mask
    if key_bias is not None:  # the mask now differs per head, so it joins the bias
        hidden = torch.zeros(key_bias.shape, device=k.device).masked_fill(~key_bias, -torch.inf)
        hidden = hidden[:, None, :].expand(batch, heads, -1).gather(-1, key_order)[:, :, None, :]
        bias = bias + hidden if isinstance(bias, Tensor) else hidden
    ordered = replace(
        call,
        q=call.q.take_along_dim(query_order[..., None], 2),
        k=k.take_along_dim(key_order[..., None], 2),
        v=v.take_along_dim(key_order[..., None], 2),
        bias=bias,
        key_mask=None,
        pattern=Grouped(labels.gather(-1, query_order), key_labels.gather(-1, key_order)),
    )
    result = _run_plan(ordered)
    back = query_order.argsort(-1)
    lse = None if result.lse is None else result.lse.gather(-1, back)
    return Result(result.out.take_along_dim(back[..., None], 2), lse=lse)


def _table(call: Call, plan: Plan, group: Tiles) -> tuple[Tensor, Tensor]:
    """What is added to the scores of a group (X, U, tq, width), and which of it each slot uses."""
    nothing = call.q.new_empty(0, dtype=torch.float32)
    bias = call.bias
    if bias is None:
        return (nothing if group.mask is None else group.mask[None]), group.mask_of
    mask = 0.0 if group.mask is None else group.mask
    if not isinstance(bias, Tensor):
        if group.offsets is None:
            axes_for(bias, call.pattern, call.n, call.m)  # says that the pattern has no axes
        assert group.offsets is not None  # patterns with axes have them
        bias.check(len(group.offsets))
        if isinstance(bias, RelativeBias):
            return bias.at(list(group.offsets)) + mask, group.mask_of
    values = _logits(bias, call, group) if isinstance(bias, RelativeLogits) else _gathered(bias, call, plan, group)
    if group.mask is not None:  # (X, T, tq, width): every tile has a table of its own
        chosen = group.mask[group.mask_of].transpose(2, 3).flatten(3)  # (G, T, tq, slots * width)
        values = values + chosen
    return values, torch.arange(group.tiles, device=values.device).view(1, -1, 1)


def _logits(bias: RelativeLogits, call: Call, group: Tiles) -> Tensor:
    """(B * H, T, tq, width) relative logits of every tile."""
    assert group.offsets is not None  # checked by the caller
    of_tile = group.mask_of[0, :, 0]
    grid = group.key_grid
    total = None
    for axis, (logits, centre, offsets) in enumerate(zip(bias.logits, bias.centre, grid or group.offsets, strict=True)):
        rows = logits.flatten(0, 1)[:, group.queries.clamp(max=call.n - 1)]  # (B * H, T, tq, entries)
        place = (offsets + centre).clamp(0, logits.shape[-1] - 1)[of_tile]
        value = rows.gather(3, place.expand(rows.shape[0], -1, -1, -1))
        if grid:  # (B * H, T, tq, 1, ..., n_a, ..., 1): every value once, and repeated by the sum
            value = value.view(*value.shape[:3], *(value.shape[3] if a == axis else 1 for a in range(len(grid))))
        total = value if total is None else total + value
    assert total is not None  # a pattern has at least one axis
    return total.flatten(3)


def _gathered(bias: Tensor, call: Call, plan: Plan, group: Tiles) -> Tensor:
    """(X, T, tq, width) entries of a dense bias at every tile's pairs."""
    batch, heads = call.q.shape[:2]
    full = bias.expand(*bias.shape[: bias.ndim - 2], plan.n, plan.m)
    full = full.view((1,) * (4 - full.ndim) + full.shape)
    if full.shape[0] > 1 or group.keys.shape[0] > 1:
        full = full.expand(batch, heads, -1, -1)
    full = full.flatten(0, 1)
    tokens = group.keys[..., None] * group.key_block + torch.arange(group.key_block, device=bias.device)
    tokens = tokens.flatten(2).clamp(max=plan.m - 1)  # (G, T, width)
    queries = group.queries.clamp(max=plan.n - 1)
    x = torch.arange(full.shape[0], device=bias.device)[:, None, None, None]
    return full[x, queries[None, :, :, None], tokens[:, :, None, :]]
