"""RazorAttention's settings, and the method that gives a model its cache; see the package for the equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.language.caches.method import CacheMethod, CacheSource
from heed.language.caches.rule import CacheRule
from heed.language.razor.heads import RetrievalHeads
from heed.language.razor.rule import RazorRule
from heed.language.razor.store import Budget
from heed.methods import Handle

if TYPE_CHECKING:
    from heed.language.razor.layer import RazorLayer

Policy = Literal["prompt", "rolling"]


@provides("65-razor")
@dataclass(frozen=True)
class Razor(CacheMethod):
    """Retrieval heads keep every token; the others keep the first, the last, and one that stands for all they dropped.

        heads = profile_heads(model).select()         # once for a model; heads.save(path), RetrievalHeads.load(path)
        with heed.apply(model, Razor(heads)) as handle:
            cache = handle.state.cache()
            model.generate(ids, past_key_values=cache)
            print(cache.report())

    Works on decoders of transformers (Llama, Mistral, Qwen, Gemma, GPT-2 with a given list and others), prompts in one piece
    or in chunks, batches with padding, beam search, several questions to one prompt: what is dropped does not depend on any
    query. A prompt shorter than window + sinks is kept whole. The attention over a prompt is the model's own; that over a
    later chunk or a second prompt sees the compressed cache.

    The paper does not say what happens to tokens that are generated. By default they are all kept, as is the case for its
    equations; `policy="rolling"` moves them through the window as well.

    At the paper's window of 4,000 tokens nothing is gained below that length; `share` says how much is kept. To make the
    cache of 4,096 tokens 70 % smaller take a smaller one, such as window=512, divisor=8.

    Stacks with another cache method by `store`, which then holds the retrieval heads; the other heads' few tokens stay as
    they are. Two methods applied one after the other are refused, as a model has one cache.

    Args:
        heads: the retrieval heads, or a function that finds them in the model to which the method is applied, such as
            `lambda model: profile_heads(model).select()`. Layers that hold a sliding window of their own are left as they
            are, whatever the list says.
        window: last tokens that the other heads keep, at least (S0).
        divisor: they keep N / divisor of N tokens, if that is more (C); None for `window` at any length.
        sinks: first tokens that they keep (N0).
        policy: "prompt", to compress after every step of several tokens; "rolling", while generating too.
        interval: generated tokens between two compressions, with "rolling".
        compensate: keep the mean of the dropped tokens; without, they are gone.
        store: another cache method for the retrieval heads, such as `ZipCache()`; None keeps them as they are.

    Raises:
        ValueError: sizes that are not possible.
    """

    heads: RetrievalHeads | Callable[[Any], RetrievalHeads]
    window: int = 4000
    divisor: float | None = 5
    sinks: int = 4
    policy: Policy = "prompt"
    interval: int = 64
    compensate: bool = True
    store: CacheMethod | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.heads, RetrievalHeads) and not callable(self.heads):
            raise TypeError(
                f"heads must be RetrievalHeads, not {type(self.heads).__name__}; see profile_heads(model).select()"
            )
        for name, least in (("window", 1), ("sinks", 0), ("interval", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more")
        if self.divisor is not None and not 1 <= self.divisor < math.inf:
            raise ValueError(f"divisor={self.divisor} must be 1 or more, or None for a window that does not grow")
        if self.policy not in get_args(Policy):
            raise ValueError(unknown("policy", self.policy, get_args(Policy)))
        if isinstance(self.store, Razor):
            raise ValueError("store=Razor(...): the retrieval heads need all tokens; choose a method that keeps them")

    @property
    def budget(self) -> Budget:
        """What the other heads keep."""
        return Budget(self.sinks, self.window, self.divisor, self.compensate)

    @property
    def chosen(self) -> RetrievalHeads:
        """The list of heads.

        Raises:
            ValueError: it is known only when the method is applied.
        """
        if isinstance(self.heads, RetrievalHeads):
            return self.heads
        raise ValueError("the retrieval heads are found when the method is applied; give a RetrievalHeads list instead")

    def groups(self, index: int) -> tuple[tuple[tuple[int, ...], Budget], ...]:
        """The heads of a layer that are no retrieval heads, those with the same budget together."""
        heads, budgets = self.chosen, {}
        for head in heads.others(index):
            budget = self.budget
            if heads.windows is not None:
                budget = replace(budget, window=max(self.window, heads.windows[index][head]), divisor=None)
            budgets.setdefault(budget, []).append(head)
        return tuple((tuple(some), budget) for budget, some in budgets.items())

    def share(self, tokens: int) -> float:
        """Keys and values kept after a prompt of so many tokens, in units of all."""
        heads, kept = self.chosen, 0
        for index in range(len(heads.layers)):
            kept += tokens * len(heads.layers[index])
            kept += sum(len(some) * budget.kept(tokens) for some, budget in self.groups(index))
        return kept / (tokens * heads.kv_heads * len(heads.layers))

    def attach(self, host: nn.Module, handle: Handle) -> CacheSource:
        config = getattr(host, "config", None)
        if config is None or getattr(config, "is_encoder_decoder", False):
            return super().attach(host, handle)  # which refuses it
        heads = self.heads if isinstance(self.heads, RetrievalHeads) else self.heads(host)
        text = config.get_text_config(decoder=True)
        heads.check(text)
        if getattr(text, "num_kv_shared_layers", None):
            raise ValueError(
                f"{type(host).__name__} shares keys between layers, which would each need the same heads to keep them; "
                "Razor is for models whose layers have keys of their own"
            )
        return CacheMethod.attach(replace(self, heads=heads), host, handle)

    def rule(self) -> RazorRule:
        return RazorRule()

    def layer(self, index: int, rule: CacheRule | None) -> RazorLayer:
        from heed.language.razor.layer import RazorLayer

        return RazorLayer(self, index, rule)
