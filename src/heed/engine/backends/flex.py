"""PyTorch's flex_attention, compiled: the plan's blocks as a BlockMask, the pattern's arithmetic as its mask function."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from heed.catalogue import provides
from heed.engine.bias import Bias, RelativeBias, axes_for, token_offsets
from heed.engine.blocks import block_bounds
from heed.engine.call import Call, Result
from heed.engine.constants import kept
from heed.engine.pattern import Pattern, Rule

_BLOCK = 128


def refuse(call: Call) -> str | None:
    if call.weights:
        return "it never forms the weights; use backend='reference'"
    if call.lse:
        return "its logsumexp is not offered; use backend='tiled'"
    if call.dropout > 0:
        return "it has no dropout; use backend='tiled'"
    if call.q.device.type == "cpu" and call.needs_grad:
        return "flex_attention has no backward pass on a CPU; use backend='tiled'"
    if call.q.dtype == torch.float64:
        return "it does not take float64; use backend='tiled' or 'reference'"
    return None


def run(call: Call) -> Result:
    device = call.q.device
    if call.pattern.static and call.key_mask is None:
        mask = _static_mask(call.pattern, call.n, call.m, device)
    else:
        mask = block_mask(call.pattern, call.n, call.m, device, call.q.shape[0], call.q.shape[1], call.key_mask)
    options: dict[str, Any] = {"scale": call.scale, "enable_gqa": call.groups > 1}
    if call.bias is not None:
        options["score_mod"] = _score_mod(call.bias, call)
    return Result(_compiled()(call.q, call.k, call.v, block_mask=mask, **options))


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


@kept
def _static_mask(pattern: Pattern, n: int, m: int, device: torch.device) -> BlockMask:
    return block_mask(pattern, n, m, device)


@provides("13-fna")
def block_mask(
    pattern: Pattern,
    n: int,
    m: int | None = None,
    device: torch.device | str = "cpu",
    batch: int = 1,
    heads: int = 1,
    key_mask: Tensor | None = None,
) -> BlockMask:
    """A pattern as the BlockMask that `torch.nn.attention.flex_attention` takes, with blocks of 128 tokens.

    Args:
        pattern: any of `heed.patterns`.
        n: queries.
        m: keys, default n.
        device: where the mask is used.
        batch, heads: sizes for patterns chosen per batch element and head; static patterns broadcast.
        key_mask: (batch, m) bool, False where a key is padding.

    Raises:
        ValueError: n or m do not fit the pattern.
    """
    m = n if m is None else m
    device = torch.device(device)
    pattern.check(n, m)
    some, every = block_bounds(pattern, n, m, _BLOCK, _BLOCK, device, batch, heads)
    if m % _BLOCK:
        every = every.clone()
        every[..., -1] = False
    rule = pattern.rule(n, m, device)
    if key_mask is not None:
        every = torch.zeros_like(every)
        rule = _masked(rule, key_mask)
    partial, full = some & ~every, every
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=_BLOCK, mask_mod=rule, seq_lengths=(n, m)
    )


def _masked(rule: Rule, key_mask: Tensor) -> Rule:
    return lambda b, h, q, k: rule(b, h, q, k) & key_mask[b, k]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each row of blocks visits, and which, visited ones first."""
    order = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int(), order.int().contiguous()


def _score_mod(bias: Bias, call: Call) -> Callable[..., Tensor]:
    if isinstance(bias, Tensor):
        full = bias.expand(*call.q.shape[:2], call.n, call.m)
        return lambda score, b, h, q, k: score + full[b, h, q, k]
    tables = token_offsets(axes_for(bias, call.pattern, call.n, call.m), call.n, call.m, call.q.device)
    if isinstance(bias, RelativeBias):
        table = bias.table.expand(call.q.shape[1], *bias.table.shape[1:])

        def relative(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            places = [
                (place[k] - anchor[q] + entries // 2).clamp(0, entries - 1)
                for (anchor, place), entries in zip(tables, table.shape[1:], strict=True)
            ]
            return score + table[(h, *places)]

        return relative

    def logits(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        for values, centre, (anchor, place) in zip(bias.logits, bias.centre, tables, strict=True):
            score = score + values[b, h, q, (place[k] - anchor[q] + centre).clamp(0, values.shape[-1] - 1)]
        return score

    return logits
