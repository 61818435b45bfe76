"""Layers with one packed projection to q, k and v, as timm and heed have them: their own equations, with rules.

q, k, v = x W_qkv;    y = rules(q, k, v) W_proj
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor

from heed.engine.bias import dense_bias
from heed.engine.patterns import Full
from heed.hosts.rules import AttentionCall, Rules, run_rules
from heed.layers.attention import PatternAttention


def timm_forward(layer: TimmAttention, rules: Rules) -> Callable[..., Tensor]:
    """The forward of timm's `Attention`, (B, N, C) to (B, N, C), with rules."""

    def forward(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = layer.qkv(x).view(batch, tokens, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
        call = AttentionCall(
            layer,
            rules.layer,
            layer.q_norm(q),
            layer.k_norm(k),
            v,
            attn_mask,
            causal=is_causal and attn_mask is None,
            scale=layer.scale,
            dropout=layer.attn_drop.p if layer.training else 0.0,
        )
        out, _ = run_rules(call, rules)
        y = layer.norm(out.reshape(batch, tokens, layer.attn_dim))
        if layer.gate is not None:
            y = y * layer.gate(x).sigmoid()
        return layer.proj_drop(layer.proj(y))

    return forward


def heed_mix(layer: PatternAttention, rules: Rules) -> Callable[..., Tensor]:
    """The `mix` of heed's `PatternAttention`, (B, H, N, D) to (B, H, N, D), with rules."""
    plain = layer.mix

    def mix(q: Tensor, k: Tensor, v: Tensor, layout: tuple[int, ...]) -> Tensor:
        dropout = layer.attn_drop if layer.training else 0.0
        mask = None
        if any(rule.core or rule.weights for rule in rules):  # they see the pattern as a mask; others do not need it
            mask = _dense(layer, layout, q.shape[2], q.device)
        call = AttentionCall(layer, rules.layer, q, k, v, mask, causal=False, scale=layer.scale, dropout=dropout)
        out, _ = run_rules(call, rules, lambda call: plain(call.query, call.key, call.value, layout).transpose(1, 2))
        return out.transpose(1, 2)

    return mix


def _dense(layer: PatternAttention, layout: tuple[int, ...], tokens: int, device: torch.device) -> Tensor | None:
    """Pattern and bias of a layer as one additive mask (1, H or 1, N, N); None where all pairs are kept as they are."""
    pattern, bias = layer.pattern(layout), layer.bias()
    if bias is None and isinstance(pattern, Full):
        return None
    allowed = pattern.mask(tokens, tokens)
    scores = torch.zeros(1, 1, tokens, tokens) if bias is None else dense_bias(bias, pattern, tokens, tokens)
    return scores.masked_fill(~allowed.to(scores.device), -torch.inf).to(device)
