"""What a gate is given in a host: queries and keys before rotary embedding, and the rotary tables of their tokens.

The tokens of the running call come from the projections. Keys that are in the cache already were rotated when they came;
they are turned back, so that nothing needs to be remembered between the parts of a prompt, beams, or prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from heed.hosts.attach import attention_layers
from heed.hosts.projections import Unrotated, unrotate
from heed.hosts.rules import AttentionCall
from heed.language.seer.pooling import Tables
from heed.language.spans import Span
from heed.methods import Handle


class GateInputs:
    """Hooks on a host that give the gates of some of its layers what they ask for.

    Args:
        host: the model.
        layers: numbers of attention layers.
        handle: removes the hooks.
    """

    def __init__(self, host: nn.Module, layers: Iterable[int], handle: Handle) -> None:
        found = attention_layers(host)
        self._unrotated = {number: Unrotated(found[number], handle) for number in layers}
        self._tables: dict[int, Tables] = {}
        self._made: dict[tuple[Any, ...], tuple[nn.Module, Tensor, dict[str, Any], Tensor]] = {}
        for number in self._unrotated:
            handle.hook(found[number].register_forward_pre_hook(partial(self._given, number), with_kwargs=True))
        for module in host.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                handle.hook(module.register_forward_hook(self._computed, with_kwargs=True))

    def __call__(self, call: AttentionCall, span: Span, *, cached: bool = True) -> tuple[Tensor, Tensor, Tables | None]:
        """Queries (b, H, Q, d) and keys (b, G, K, d) of a span, not rotated, and tables (b or 1, K, r) of the keys' tokens.

        Without the keys that are in the cache already where `cached` is False.
        """
        made = self._unrotated[call.layer]
        q, now = span.queries(made.queries()), span.queries(made.keys())
        offset = span.last - span.first - now.shape[2] if cached else 0
        tables = self._tables.get(call.layer)
        if tables is not None:
            tables = self._whole(call, span, offset) if offset else _part(tables, span)
        if not offset:
            return q, now, tables
        earlier = span.keys(call.key)[:, :, :offset]
        if tables is not None:
            earlier = unrotate(earlier, tables[0][:, :offset], tables[1][:, :offset])
        return q, torch.cat([earlier, now], 2), tables

    def forget(self, layer: int) -> None:
        """Free what the projections of a layer made."""
        self._unrotated[layer].forget()

    def _whole(self, call: AttentionCall, span: Span, offset: int) -> Tables:
        """Tables of all keys, from the module that made those of the running call's tokens."""
        now = self._tables[call.layer][0]
        module, positions, options = next(
            (module, positions, options) for module, positions, options, cos in self._made.values() if cos is now
        )
        begin = positions[:, span.begin] if len(positions) == 1 else positions[list(span.rows), span.begin]
        steps = torch.arange(-offset, span.stop - span.begin, device=positions.device)
        return module.forward(call.key.detach(), position_ids=begin[:, None] + steps, **options)

    def _given(self, number: int, _: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            cos = tables[0]
            half = cos.shape[-1] // 2
            if not torch.equal(cos[..., :half], cos[..., half:]):
                raise ValueError(
                    "the host rotates pairs of neighbouring channels, not halves as Llama does; its gates would not be "
                    "those that the paper describes"
                )
            self._tables[number] = tables

    def _computed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Tables) -> None:
        """Remember how tables were made: forward(x, position_ids), and the kind of layer where there are several."""
        given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
        positions = given.pop("position_ids")
        given.pop("x", None)
        self._made[(module, *sorted(given.items()))] = (module, positions, given, made[0])


def _part(tables: Tables, span: Span) -> Tables:
    """Those of a span's rows and tokens."""
    cos, sin = (x if len(x) == 1 else x[list(span.rows)] for x in tables)
    return cos[:, span.begin : span.stop], sin[:, span.begin : span.stop]
