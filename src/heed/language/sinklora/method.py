"""S2-Attn and SF-Attn in a language model of transformers: while it is fine-tuned on long texts, not when it is used.

with heed.apply(model, SFAttention()):
    model.train(); model(ids, labels=ids).loss.backward()
model.eval(); model.generate(ids)               full attention, over any cache
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.hosts.attach import attach_rule, attention_layers
from heed.hosts.rules import AttentionCall
from heed.language.sinklora.attention import grouped_attention
from heed.language.sinklora.patterns import HeadGroups
from heed.language.spans import Span
from heed.language.sparse import SpanRule, sparse_layers
from heed.methods import Handle, Method

Lengths = Literal["row", "batch"]


@provides("70-sinklora")
@dataclass(frozen=True)
class S2Attention(HeadGroups, Method):
    """Shifted sparse attention (LongLoRA) in training; the model is as ever in evaluation and wherever a cache has tokens.

    It acts on whole sequences, with as many queries as keys: a decoder with tokens in its cache silently has full attention,
    with `inference=True` too. Padding, on either side, is left out: groups begin at the first token of a row. Also for the
    models that peft makes.

    Args:
        ratio, group, returned, sinks, wrap, uneven: see `HeadGroups`.
        inference: act in evaluation as well, on prompts.
        lengths: of what the group is a fraction: of each "row" without its padding, so that a batch gives what its rows
            give alone, or of the padded "batch", as in LongLoRA.
        dense_layers: numbers of attention layers that are left as they are; negative ones count from the last.

    Raises:
        ValueError: settings that are not possible; no layer is left.
        NotImplementedError: a layer has a sliding window of its own, or no attention, and is not among dense_layers.
    """

    inference: bool = False
    lengths: Lengths = "row"
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lengths not in get_args(Lengths):
            raise ValueError(unknown("value of lengths", self.lengths, get_args(Lengths)))

    def attach(self, host: nn.Module, handle: Handle) -> None:
        base = getattr(host, "get_base_model", None)  # of peft's models
        if base is not None:
            host = base()
        attach_rule(host, _GroupRule(self), handle, _layers(host, type(self).__name__, self.dense_layers))


@provides("70-sinklora")
@dataclass(frozen=True)
class SFAttention(S2Attention):
    """Sink-fixed attention (SinkLoRA): half of the shifted heads are not shifted, and all tokens see the first four.

    The same as `S2Attention` with other defaults; `SFAttention(returned=0, sinks=0)` is S2-Attn. It was not released: this
    is heed's reading of the paper's text.
    """

    returned: float = 0.5
    sinks: int = 4


class _GroupRule(SpanRule):
    """Attention in groups, where the method acts."""

    def __init__(self, method: S2Attention) -> None:
        super().__init__()
        self.method = method

    def core(self, call: AttentionCall) -> Tensor | None:  # type: ignore[override]
        acts = call.module.training or self.method.inference
        if not acts or call.query.shape[2] == 1 or any(_continues(span) for span in self.spans(call)):
            return None
        return super().core(call)

    def attend(self, call: AttentionCall, span: Span) -> Tensor:
        q, k, v = span.queries(call.query), span.keys(call.key), span.keys(call.value)
        length = q.shape[2] if self.method.lengths == "row" else call.query.shape[2]
        size = self.method.group_size(length)
        return grouped_attention(q, k, v, self.method, scale=call.scale, dropout=call.dropout, size=size)

    def named(self) -> str:
        return type(self.method).__name__


def _continues(span: Span) -> bool:
    """Whether there are tokens before the queries."""
    return span.stop - span.begin != span.last - span.first


def _layers(host: nn.Module, named: str, dense: tuple[int, ...]) -> list[int]:
    """Numbers of the attention layers that change."""
    windows = NotImplementedError(
        f"{named} is for layers that see the whole text: {type(host).__name__} has some with a sliding window of their own "
        "or without attention; name those that are to stay as they are in dense_layers"
    )
    try:
        whole = sparse_layers(host, named)
    except ValueError as error:
        raise windows from error
    number = len(attention_layers(host))
    left = {layer % number for layer in dense}
    if not set(range(number)) <= left | set(whole):
        raise windows
    return sparse_layers(host, named, dense)
