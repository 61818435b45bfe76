"""Which heads look things up: induction and echo scores of a decoder on a random text that it reads several times.

    text = [BOS, s, s, ..., s],   s = SEG random tokens,   R times; positions are counted without BOS
    echo_i      = sum_j A[i, j]         over the earlier places j < i of token i:  j = i - SEG, i - 2 SEG, ...
    induction_i = sum_j A[i, j + 1]     over the tokens that came after it then
    score = mean over i >= SEG;   a key-value head has the largest score of its query heads         A (L, H, n, n)

The heads of all layers compete: the round(ratio x count) best are retrieval heads, and those that tie with the last of them.
Only R columns of every row of A are ever kept. Tang et al., "RazorAttention: Efficient KV Cache Compression Through Retrieval
Heads", ICLR 2025, arXiv 2407.15891; scores as in the authors' tool (msmodelslim), from attention after rotary embedding.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.hosts.attach import attach_rule, attention_layers, is_transformers
from heed.hosts.rules import AttentionCall, AttentionRule, attention_weights
from heed.language.razor.heads import RetrievalHeads
from heed.methods import Handle, Method, apply

_FIRST_TOKEN = 10_000  # of the tokens that the authors' tool draws; it takes as many as a segment has
_AT_ONCE = 1 << 26  # attention weights in memory


@provides("65-razor")
@dataclass(frozen=True, eq=False)
class HeadScores:
    """What `profile_heads` found; NaN where a layer was left out.

    Args:
        induction, echo: (L, H), score of every query head.
        kv_heads: G, key-value heads of a layer; G divides H.
    """

    induction: Float[Tensor, "L H"]
    echo: Float[Tensor, "L H"]
    kv_heads: int

    def grouped(self) -> tuple[Float[Tensor, "L G"], Float[Tensor, "L G"]]:
        """Induction and echo score of every key-value head: the largest of its query heads."""
        first, second = (x.unflatten(1, (self.kv_heads, -1)).amax(-1) for x in (self.induction, self.echo))
        return first, second

    def select(self, induction_ratio: float = 0.14, echo_ratio: float = 0.01) -> RetrievalHeads:
        """The heads that keep everything: the best by induction and the best by echo, of all layers together.

        Args:
            induction_ratio, echo_ratio: share of all key-value heads, rounded to a number of heads (half to even).

        Raises:
            ValueError: a ratio outside [0, 1].
        """
        induction, echo = self.grouped()
        return RetrievalHeads.of(top_heads(induction, induction_ratio) | top_heads(echo, echo_ratio))


@provides("65-razor")
def top_heads(scores: Float[Tensor, "L G"], ratio: float) -> Bool[Tensor, "L G"]:
    """The round(ratio x count) heads with the largest scores of all layers, and those that tie with the last of them.

    Heads whose score is NaN neither count nor are chosen.

    Raises:
        ValueError: a ratio outside [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio} must be a share of the heads, between 0 and 1")
    known = scores[~scores.isnan()]
    number = round(ratio * len(known))
    if number == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores >= known.topk(number).values[-1]


@provides("65-razor")
def repeated_scores(
    weights: Float[Tensor, "... R K"], rows: Int[Tensor, " R"], segment: int, begin: int = 0
) -> tuple[Float[Tensor, "... R"], Float[Tensor, "... R"]]:
    """Induction and echo of some rows of attention maps over a repeated text.

    Args:
        weights: (..., R, K), rows of the maps.
        rows: (R,), the positions of their queries; those before the second reading score 0.
        segment: SEG, tokens that repeat.
        begin: columns before the text, one for BOS.

    Returns:
        induction and echo, both (..., R)
    """
    earlier = torch.arange(1, max(2, math.ceil(weights.shape[-1] / segment)), device=rows.device) * segment
    at = rows[:, None] - earlier  # (R, number of readings before)
    meant = (at >= 0).to(weights.dtype)
    shape = (*weights.shape[:-1], len(earlier))
    echo, induction = (
        (weights.gather(-1, (at.clamp(min=0) + begin + step).expand(shape)) * meant).sum(-1) for step in (0, 1)
    )
    return induction, echo


@provides("65-razor")
def repeated_prompt(
    vocabulary: int, bos: int, *, segment: int = 2500, repeats: int = 4, seed: int = 0
) -> Int[Tensor, "1 n"]:
    """BOS and a segment of random tokens, several times over: (1, 1 + repeats * segment).

    Tokens are drawn from `segment` ids: from 10,000 on as in the authors' tool, or the last ones of a small vocabulary.

    Raises:
        ValueError: a vocabulary smaller than a segment, or a text that does not repeat.
    """
    if segment < 1 or repeats < 2:
        raise ValueError(f"segment={segment} and repeats={repeats}: a text repeats at least once and is not empty")
    if vocabulary < segment:
        raise ValueError(
            f"a segment of {segment} tokens needs as many to draw from, and the vocabulary has {vocabulary}; give a smaller "
            f"segment, such as segment={vocabulary}"
        )
    low = min(_FIRST_TOKEN, vocabulary - segment)
    text = torch.randint(low, low + segment, (segment,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.tensor([bos]), text.repeat(repeats)])[None]


@provides("65-razor")
@torch.no_grad()
def profile_heads(
    model: nn.Module, *, segment: int = 2500, repeats: int = 4, bos: int | None = None, seed: int = 0
) -> HeadScores:
    """Score every head of a decoder with rotary embedding by how it attends to a text that repeats.

        heads = profile_heads(model).select()
        heads.save("llama3-8b.json")

    One forward pass of 1 + repeats * segment tokens; memory is linear in them. Layers with a sliding window of their own are
    left out, with a warning.

    Args:
        model: of transformers, whose attention has rotary embedding (Llama, Mistral, Qwen, Gemma and others).
        segment: tokens that repeat.
        repeats: how often they are read.
        bos: token in front; None for the one of the model's config. The authors' tool takes the last token that the
            tokenizer makes of an empty text, or of "A".
        seed: of the text.

    Raises:
        TypeError: no decoder of transformers.
        ValueError: attention without rotary embedding, no BOS, or a vocabulary smaller than a segment.
    """
    if not is_transformers(model):
        raise TypeError(f"{type(model).__name__} is no model of transformers; its heads cannot be profiled")
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    if getattr(config, "rope_parameters", None) is None:
        raise ValueError(
            f"{type(model).__name__} has no rotary embedding, for which the scores are meant; a model with ALiBi has its "
            "windows computed from its weights (heed.language.razor.alibi_windows), any other takes a RetrievalHeads list"
        )
    bos = config.bos_token_id if bos is None else bos
    if bos is None:
        raise ValueError(
            f"the config of {type(model).__name__} has no bos_token_id; give bos=, a token to put in front"
        )
    ids = repeated_prompt(config.vocab_size, int(bos), segment=segment, repeats=repeats, seed=seed)
    decoder: Any = model.base_model  # without the logits of all tokens
    training = model.training
    model.eval()
    try:
        with apply(model, _Profiler(segment)) as handle:
            decoder(ids.to(decoder.device), use_cache=False)
            return handle.state.scores()
    finally:
        model.train(training)


@dataclass(frozen=True)
class _Profiler(Method):
    """Collects the scores of a host in one forward pass."""

    segment: int

    def attach(self, host: nn.Module, handle: Handle) -> _ProfileRule:
        rule = _ProfileRule(self.segment, len(attention_layers(host)))
        attach_rule(host, rule, handle)
        return rule


class _ProfileRule(AttentionRule):
    """Looks at R columns of every row of the attention maps, some rows at a time."""

    def __init__(self, segment: int, layers: int) -> None:
        self.segment, self.layers = segment, layers
        self.found: dict[int, Tensor] = {}
        self.kv_heads = 0

    def after(self, call: AttentionCall, out: Tensor) -> Tensor:
        if call.mask is None and call.causal:  # no window
            self.kv_heads = call.key.shape[1]
            self.found[call.layer] = self._scores(call)
        return out

    def scores(self) -> HeadScores:
        left = [number for number in range(self.layers) if number not in self.found]
        if len(left) == self.layers:
            raise ValueError(
                "no layer of this model has plain causal attention over all tokens, so there is nothing to profile"
            )
        if left:
            warnings.warn(
                f"{len(left)} of {self.layers} layers see a sliding window only and are not profiled: "
                f"{', '.join(map(str, left))}",
                stacklevel=4,
            )
        none = torch.full_like(next(iter(self.found.values())), torch.nan)
        both = torch.stack([self.found.get(number, none) for number in range(self.layers)])
        return HeadScores(both[:, 0], both[:, 1], self.kv_heads)

    def _scores(self, call: AttentionCall) -> Tensor:
        """(2, H): induction and echo of a layer."""
        (_, heads, tokens, _), total = call.query.shape, torch.zeros(2, call.query.shape[1])
        step = max(1, _AT_ONCE // (heads * tokens))
        for rows in torch.arange(self.segment, tokens - 1, device=call.query.device).split(step):
            stop = int(rows[-1]) + 2  # keys before, BOS and the query's own
            part = call.replace(
                query=call.query[:, :, int(rows[0]) + 1 : stop],
                key=call.key[:, :, :stop],
                value=call.value[:, :, :stop],
            )
            scores = repeated_scores(attention_weights(part)[0].float(), rows, self.segment, begin=1)
            total += torch.stack([score.sum(-1) for score in scores]).cpu()
        return total / (tokens - 1 - self.segment)
