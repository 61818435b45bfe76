"""Attach a rule to the attention of a host: transformers' models, timm's vision transformers, heed's own layers."""

from __future__ import annotations

import sys
from collections.abc import Collection

from timm.layers.attention import Attention as TimmAttention
from torch import nn

from heed.hosts.bloom import bloom_forward, is_bloom
from heed.hosts.packed import heed_mix, timm_forward
from heed.hosts.rules import RULES, AttentionRule, Rules, check_together
from heed.layers.attention import PatternAttention
from heed.methods import Handle


def attach_rule(host: nn.Module, rule: AttentionRule, handle: Handle, layers: Collection[int] | None = None) -> None:
    """Let a rule take part in the attention layers of a host, until the handle is removed.

    Args:
        host: a transformers model (or the part of one that is to change, such as its language model), a timm model, or
            a model with heed's attention layers.
        rule: what changes. Rules attached later act after those attached earlier.
        handle: removes the rule.
        layers: numbers of the attention layers that get the rule; default all.

    Raises:
        TypeError: the host has no attention that a rule can reach.
        ValueError: the rule does not go together with those the host already has.
    """
    found = attention_layers(host)
    if is_transformers(host) and not all(map(is_bloom, found)):
        from heed.hosts.transformers import use_rules

        use_rules(host, handle)
    for number, layer in enumerate(found):
        if layers is None or number in layers:
            _add(layer, number, rule, handle)


def is_transformers(host: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(host, library.PreTrainedModel)


def attention_layers(host: nn.Module) -> list[nn.Module]:
    """The attention layers of a host, in order.

    Raises:
        TypeError: there are none that a rule can reach.
    """
    if is_transformers(host):  # whose attention layers are called so, whatever else they are
        layers = [layer for layer in host.modules() if "Attention" in type(layer).__name__]
        layers = [layer for layer in layers if not any("Attention" in type(part).__name__ for part in layer.children())]
    else:
        layers = list(filter(lambda layer: isinstance(layer, TimmAttention | PatternAttention), host.modules()))
    if not layers:
        raise TypeError(
            f"{type(host).__name__} has no attention layers that heed can reach: it knows transformers' models, timm's "
            "Attention (vit, deit and others) and heed's own attention layers"
        )
    return layers


def _add(layer: nn.Module, number: int, rule: AttentionRule, handle: Handle) -> None:
    """Give a layer a rule; the first one sends the layer through its rules, the last to go undoes that."""
    rules: Rules = vars(layer).get(RULES) or Rules(number)
    check_together([*rules, rule])
    if not rules:
        setattr(layer, RULES, rules)
        if isinstance(layer, TimmAttention):
            layer.forward = timm_forward(layer, rules)
        elif isinstance(layer, PatternAttention):
            layer.mix = heed_mix(layer, rules)
        elif is_bloom(layer):
            layer.forward = bloom_forward(layer, rules)
    rules.append(rule)

    def undo() -> None:
        rules.remove(rule)
        if not rules:
            for name in (RULES, "forward", "mix"):
                vars(layer).pop(name, None)

    handle.on_remove(undo)
