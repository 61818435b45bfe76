"""Where a cache layer meets the attention over its keys: an `AttentionRule` that hands it the call, queries included.

An attention layer of transformers first updates its cache layer, and then computes attention over what that returned:

    k, v = cache_layer.update(k, v)        the layer reports to the rule
    y    = attention(q, k, v, mask)        the rule hands the call to the layer

The cache object itself never reaches the attention function, and queries never reach the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from heed.hosts.rules import AttentionCall, AttentionRule

if TYPE_CHECKING:
    from heed.language.caches.layer import CompressedLayer


class CacheRule(AttentionRule):
    """Hands each attention call to the cache layer that has just been updated.

    Attributes:
        layer: the cache layer whose keys the current call sees, for a subclass with a `core` of its own; None where the
            attention layer did not update any (a model without a cache, or with keys of another layer).
        removed: the method is no longer applied, so no call will come.
    """

    def __init__(self) -> None:
        self.layer: CompressedLayer | None = None
        self.removed = False

    def after(self, call: AttentionCall, out: Tensor) -> Tensor:
        layer, self.layer = self.layer, None
        if layer is not None:
            layer.observe(call)
        return out

    def remove(self) -> None:
        """Turn away caches that outlive the method."""
        self.layer, self.removed = None, True
