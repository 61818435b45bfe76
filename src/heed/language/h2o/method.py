"""H2O's budgets, and the method that gives a model its cache; see the package for the equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from heed.catalogue import provides
from heed.hosts.rules import AttentionCall
from heed.language.caches.method import CacheMethod
from heed.language.caches.rule import CacheRule

if TYPE_CHECKING:
    from heed.language.h2o.layer import H2OLayer


@provides("70-sinklora")
@dataclass(frozen=True)
class H2O(CacheMethod):
    """Evicts all tokens but the last ones and those that got most attention, after the prompt and after every new token.

        with heed.apply(model, H2O(heavy=0.25, recent=0.25)) as handle:
            cache = handle.state.cache()
            model.generate(ids, past_key_values=cache)
            print(cache.report(), cache.layers[0].held.positions)

    What is evicted is gone: every layer and head keeps its own choice of heavy + recent tokens. Keys keep the positions they
    were rotated for. Works on decoders of transformers with full attention, on prompts in one piece or in chunks, on batches
    with padding, each sequence with its own scores and budget, and under beam search. Layers with a sliding window keep
    their own cache. `heavy=0` keeps the last tokens only.

    Args:
        heavy: tokens that got most attention: an int counts them, a float is a fraction of the prompt.
        recent: the last tokens, likewise. Fractions are of the first call's tokens without padding, rounded down, and stay.

    Raises:
        ValueError: negative numbers, fractions above 1, or nothing to keep.
    """

    heavy: int | float = 0.1
    recent: int | float = 0.1

    def __post_init__(self) -> None:
        for name in ("heavy", "recent"):
            size = getattr(self, name)
            number = isinstance(size, int | float) and not isinstance(size, bool)
            if not number or not size >= 0 or (isinstance(size, float) and not size <= 1):
                raise ValueError(f"{name}={size!r} must be a number of tokens >= 0 or a fraction in [0, 1]")
        if not self.heavy and not self.recent:
            raise ValueError(f"heavy={self.heavy} and recent={self.recent} keep no token; give one of them a budget")

    def layer(self, index: int, rule: CacheRule | None) -> H2OLayer:
        from heed.language.h2o.layer import H2OLayer

        return H2OLayer(self, rule)

    def rule(self) -> CacheRule:
        return _H2ORule()

    def sizes(self, tokens: int) -> tuple[int, int]:
        """Heavy hitters and recent tokens of a sequence whose prompt has so many tokens.

        Raises:
            ValueError: both are 0.
        """
        heavy, recent = (size if isinstance(size, int) else int(size * tokens) for size in (self.heavy, self.recent))
        if heavy + recent < 1:
            raise ValueError(
                f"heavy={self.heavy} and recent={self.recent} of a prompt of {tokens} tokens keep none; give larger "
                "fractions, or numbers of tokens"
            )
        return heavy, recent


class _H2ORule(CacheRule):
    """Hides the columns of a batch in which a sequence has fewer tokens than others."""

    def before(self, call: AttentionCall) -> AttentionCall:
        from heed.language.h2o.layer import H2OLayer

        return self.layer.hide(call) if isinstance(self.layer, H2OLayer) else call
