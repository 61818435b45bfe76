"""transformers' models as hosts: one entry in its attention interface, "heed", that runs the rules of the layer.

The mask function registered beside it gives boolean masks, and none where a plain causal one will do; without it,
transformers would hand out no mask at all and a language model would see the future.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from heed.hosts.rules import RULES, AttentionCall, Rules, run_rules
from heed.methods import Handle

NAME = "heed"
_PLAIN = (NAME, "sdpa", "eager", "flash", "flex")  # how the names of implementations of plain attention begin
_BEFORE = "_heed_before"  # attribute of a model: the attention it had before its first rule


def use_rules(host: nn.Module, handle: Handle) -> None:
    """Send the attention of a model through `heed_attention`, for as long as it has rules.

    Raises:
        TypeError: the model's attention does not go through transformers' interface.
        ValueError: the model has an attention function of its own, which the rules would replace.
    """
    AttentionInterface.register(NAME, heed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    parts = [part for part in host.modules() if isinstance(part, PreTrainedModel)]
    for part in parts:
        found = part.config._attn_implementation
        if found is not None and not found.startswith(_PLAIN):
            raise ValueError(
                f"{type(part).__name__} computes attention by {found!r}, which a method would replace by plain "
                "attention; choose another with model.set_attn_implementation, such as 'sdpa', if that is meant"
            )
    for part in parts:
        vars(part).setdefault(_BEFORE, part.config._attn_implementation)

    def undo() -> None:
        for part in parts:
            if _BEFORE in vars(part) and not any(RULES in vars(layer) for layer in part.modules()):
                part.config._attn_implementation_internal = vars(part).pop(_BEFORE)

    handle.on_remove(undo)  # before any rule is attached, and so after all of this handle's are gone
    host = cast(PreTrainedModel, host)
    host.set_attn_implementation(NAME)
    if host.config._attn_implementation != NAME:
        raise TypeError(
            f"{type(host).__name__} does not compute attention through transformers' attention interface, so no method "
            "can reach it"
        )


def heed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' attention layers call: (B, H, Q, D), (B, G, K, D), (B, G, K, E) to (B, Q, H, E), weights."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:  # a static cache at its start: the places after the queries are empty
        key, value = (x[:, :, : query.shape[2]] for x in (key, value))
    rules: Rules = vars(module).get(RULES) or Rules(0)  # a copy of a model has its setting, and no rules
    call = AttentionCall(
        module,
        rules.layer,
        query,
        key,
        value,
        attention_mask,
        causal=causal,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        softcap=softcap,
        options=options,
    )
    return run_rules(call, rules, _plain)


def _plain(call: AttentionCall) -> Tensor:
    """transformers' own call of torch's fused attention."""
    out, _ = sdpa_attention_forward(
        call.module, call.query, call.key, call.value, call.mask,
        dropout=call.dropout, scaling=call.scale, is_causal=call.causal, **call.options,
    )  # fmt: skip
    return out
