"""What methods that compute the attention of a decoder themselves have in common: which layers, and rows without padding.

A new one is a `Method` whose rule is a `SpanRule`: it says in `attend` what happens to the tokens of some rows.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Collection

from jaxtyping import Float
from torch import Tensor, nn

from heed.hosts.attach import attention_layers, is_transformers
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.language.spans import Span, causal_spans


class SpanRule(AttentionRule):
    """Computes attention over the tokens of each row as if there were no padding, so that a batch gives what its rows do."""

    def __init__(self) -> None:
        self._mask: weakref.ref[Tensor] | None = None
        self._spans: list[Span] = []

    @abstractmethod
    def attend(self, call: AttentionCall, span: Span) -> Float[Tensor, "b H q E"]:
        """The attention of a span's queries over its keys."""

    def core(self, call: AttentionCall) -> Float[Tensor, "B Q H E"] | None:  # type: ignore[override]
        if call.softcap is not None or call.options.get("s_aux") is not None:
            raise ValueError(
                f"{type(call.module).__name__} caps its scores or has learned sinks, which {self.named()} cannot do"
            )
        spans = self.spans(call)
        if len(spans) == 1 and len(spans[0].rows) == len(call.query):
            span = spans[0]
            if span.stop - span.begin == call.query.shape[2]:
                return self.attend(call, span).transpose(1, 2)
        out = call.query.new_zeros(*call.query.shape[:3], call.value.shape[3])
        for span in spans:
            out[list(span.rows), :, span.begin : span.stop] = self.attend(call, span)
        return out.transpose(1, 2)

    def spans(self, call: AttentionCall) -> list[Span]:
        """Where the tokens of each row are; a mask is looked at once, though every layer is given it."""
        if call.mask is None:
            return causal_spans(call)
        if self._mask is None or self._mask() is not call.mask:
            self._spans, self._mask = causal_spans(call), weakref.ref(call.mask)
        return self._spans

    def named(self) -> str:
        """The method, for messages."""
        return type(self).__name__.strip("_").removesuffix("Rule")


def sparse_layers(host: nn.Module, named: str, dense: Collection[int] = ()) -> list[int]:
    """Numbers of the attention layers of a decoder that a method may make sparse: those that see the whole text.

    Args:
        host: a model of transformers.
        named: the method, for messages.
        dense: layers to leave out; negative numbers count from the last.

    Raises:
        TypeError: no decoder of transformers.
        ValueError: no layers are left.
    """
    if not is_transformers(host):
        raise TypeError(f"{type(host).__name__} is no model of transformers; {named} is for its decoders")
    layers = attention_layers(host)
    if not all(getattr(layer, "is_causal", True) for layer in layers):
        raise TypeError(
            f"{type(host).__name__} has attention that is not causal; {named} is for decoders. Of a model with several "
            "parts, pass the language model"
        )
    left = {number % len(layers) for number in dense if -len(layers) <= number < len(layers)}
    windowed = _windowed(host, layers)
    found = [number for number in range(len(layers)) if number not in left | windowed]
    if not found:
        raise ValueError(
            f"{named} would change none of the {len(layers)} attention layers: dense_layers={tuple(dense)}, and "
            f"{len(windowed)} have a sliding window of their own; name fewer dense layers"
        )
    return found


def _windowed(host: nn.Module, layers: list[nn.Module]) -> set[int]:
    """Numbers of the attention layers that see a sliding window of their own, or a part of the text."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    config = host.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    kinds = DynamicCache(config=config).layers
    return {
        number
        for number, layer in enumerate(layers)
        if layer.layer_idx is not None and kinds and type(kinds[layer.layer_idx]) is not DynamicLayer  # type: ignore[index]
    }
