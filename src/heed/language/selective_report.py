"""What temperatures do in a language model (card 18): tau of every token, spikiness of attention, size of its products.

    spikiness of row i   1 / (L_i sum_j s_ij^2)                  L_i keys seen; 1 for an even row, 1 / L_i for one key alone
    product norm         sqrt(mean_ij (q_i . k_j)^2)             over the pairs seen, tau_q taken out again

Both can be asked of any decoder, with temperatures or without. Zhang et al., NeurIPS 2024 (arXiv 2411.12892); the norm over
pairs is heed's own measure of the paper's query-key product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall, AttentionRule, repeat_heads
from heed.language.selective import LayerTemperatures
from heed.layers.temperature import spikiness
from heed.methods import Handle, Method, apply


@provides("18-selective-ssa")
@dataclass(frozen=True, eq=False)
class AttentionReport:
    """One layer in one forward pass; rows of padding have no meaning.

    Args:
        layer: its number.
        query, value, key: tau (B, heads, N); None where there is none.
        spikiness: (B, H, N).
        visible: (B or 1, H or 1, N) keys that a row sees; times spikiness it is an effective number of keys.
        product_norm: (H,).
    """

    layer: int
    query: Float[Tensor, "B H N"] | None
    value: Float[Tensor, "B G N"] | None
    key: Float[Tensor, "B G N"] | None
    spikiness: Float[Tensor, "B H N"]
    visible: Int[Tensor, "b h N"]
    product_norm: Float[Tensor, " H"]


@provides("18-selective-ssa")
@torch.no_grad()
def selective_report(model: nn.Module, **inputs: Any) -> list[AttentionReport]:
    """Run a decoder of transformers once and report on its attention layers; forms their N x N weights.

    Args:
        model: with temperatures or without.
        inputs: of its forward pass, such as input_ids and attention_mask.

    Raises:
        TypeError: a model whose attention cannot be reached.
        ValueError: it has a method that computes attention without forming the weights.
    """
    layers = [module for module in model.modules() if isinstance(module, LayerTemperatures)]
    for layer in layers:
        layer.watch = True
    try:
        with apply(model, _Measure()) as handle:
            model(**inputs)
            return [handle.state[number] for number in sorted(handle.state)]
    finally:
        for layer in layers:
            layer.watch = False
            layer.last.clear()


class _Measure(Method):
    """Collects the reports of a pass."""

    def attach(self, host: nn.Module, handle: Handle) -> dict[int, AttentionReport]:
        rule = _Watch()
        attach_rule(host, rule, handle)
        return rule.reports


class _Watch(AttentionRule):
    def __init__(self) -> None:
        self.reports: dict[int, AttentionReport] = {}

    def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:  # type: ignore[override]
        temperatures = getattr(call.module, "temperatures", None)
        tau = dict(temperatures.last) if isinstance(temperatures, LayerTemperatures) else {}
        allowed = call.allowed()
        if allowed is None:
            allowed = torch.ones(1, 1, *weights.shape[2:], dtype=torch.bool, device=weights.device)
        query = call.query.float()
        if "query" in tau:
            query = query / tau["query"][..., None].float()
        products = query @ repeat_heads(call.key, query.shape[1]).float().transpose(-2, -1)
        squares = (products.square() * allowed).sum((0, 2, 3))
        pairs = allowed.expand_as(products).sum((0, 2, 3)).clamp(min=1)
        visible = allowed.sum(-1)
        self.reports[call.layer] = AttentionReport(
            call.layer,
            tau.get("query"),
            tau.get("value"),
            tau.get("key"),
            spikiness(weights.float(), visible.clamp(min=1)),
            visible,
            (squares / pairs).sqrt(),
        )
        return weights
