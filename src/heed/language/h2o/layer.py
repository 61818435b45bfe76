"""H2O's cache layer: the keys and values that stay, the attention each has received, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heed.catalogue import provides
from heed.hosts.rules import AttentionCall
from heed.language.caches.layer import CompressedLayer
from heed.language.caches.rule import CacheRule
from heed.language.caches.storage import storage_nbytes
from heed.language.h2o.method import H2O
from heed.language.h2o.policy import attention_received, heavy_hitters
from heed.language.saliency import real_tokens


@dataclass(frozen=True)
class Held:
    """What a layer stores: M tokens of every head, in their order; sequences with fewer have empty places, mostly in front.

    Attributes:
        keys, values: (B, G, M, D).
        scores: (B, G, M), the attention each token has received since it came.
        positions: (B, G, M) int32, its place in the text, padding counted; -1 for an empty place.
        budget: (B, 2), heavy hitters and recent tokens of each sequence, on the CPU; 0, 0 before its first token.
    """

    keys: Float[Tensor, "B G M D"]
    values: Float[Tensor, "B G M D"]
    scores: Float[Tensor, "B G M"]
    positions: Int[Tensor, "B G M"]
    budget: Int[Tensor, "B 2"]


@provides("70-sinklora")
class H2OLayer(CompressedLayer):
    """The cache of one attention layer; `H2O` makes it.

    Args:
        settings: the method.
        rule: brings the queries.
    """

    held: Held | None

    def __init__(self, settings: H2O, rule: CacheRule | None) -> None:
        self.settings = settings
        super().__init__(rule)

    def attended(self) -> int:
        return 0 if self.held is None else self.held.keys.shape[2]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, new, _ = keys.shape
        positions = torch.arange(self.seen, self.seen + new, dtype=torch.int32, device=keys.device)
        fresh = Held(
            keys,
            values,
            torch.zeros(batch, heads, new, device=keys.device),
            positions.expand(batch, heads, new),
            torch.zeros(batch, 2, dtype=torch.int32),
        )
        self.held = fresh if self.held is None else _joined(self.held, fresh)
        return self.held.keys, self.held.values

    def hide(self, call: AttentionCall) -> AttentionCall:
        """The call with a mask for the tokens that are held: the host's own mask counts tokens that are evicted.

        Raises:
            NotImplementedError: the host adds a bias to its scores, or has a mask for every head.
        """
        queries, keys = call.query.shape[2], call.key.shape[2]
        before = keys - queries
        if self.held is None or before == 0 or (call.mask is None and not self._gaps):
            return call
        allowed = call.allowed()
        if allowed is None:
            allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=call.query.device)
        elif allowed.shape[1] > 1 or (call.mask.is_floating_point() and bool((call.mask[allowed] != 0).any())):  # type: ignore[union-attr, index]
            raise NotImplementedError(
                "the host adds a bias to its scores, or has a mask for every head; H2O moves the keys that they are for"
            )
        batch = len(call.query)
        filled = (self.held.positions[:, None, 0, :before] >= 0)[:, :, None].expand(batch, 1, queries, before)
        mask = torch.cat([filled, allowed[..., before:].expand(batch, 1, queries, queries)], -1)
        return call.replace(mask=mask, causal=False)

    @torch.no_grad()
    def observe(self, call: AttentionCall) -> None:
        """Add the call's attention to the scores, and evict."""
        super().observe(call)
        held = self.held
        if held is None:
            return
        tokens = real_tokens(call)
        length = held.keys.shape[2]
        scores = held.scores + attention_received(call, tokens)
        counts = [length] * self.batch if tokens is None else tokens.sum(-1).tolist()
        sizes = [
            size if any(size) or not count else list(self.settings.sizes(count))
            for size, count in zip(held.budget.tolist(), counts, strict=True)
        ]
        budget = torch.tensor(sizes, dtype=torch.int32)
        rooms = [min(count, sum(size)) for count, size in zip(counts, sizes, strict=True)]
        self._gaps = min(rooms) < max(rooms)
        if min(rooms) == length > call.query.shape[2]:  # nothing to evict, and nothing that is the model's own memory
            self.held = replace(held, scores=scores, budget=budget)
            return
        kept = heavy_hitters(scores, budget[:, 0], budget[:, 1], tokens)
        positions = held.positions.masked_fill(~kept, -1)
        places = kept.to(torch.uint8).argsort(dim=-1, stable=True)[
            ..., length - max(rooms) :
        ]  # the kept ones come last
        self.held = Held(
            held.keys.take_along_dim(places[..., None], 2),
            held.values.take_along_dim(places[..., None], 2),
            scores.take_along_dim(places, 2),
            positions.take_along_dim(places, 2),
            budget,
        )

    def reset(self) -> None:
        super().reset()
        self._gaps = False  # whether sequences hold different numbers of tokens

    def parts(self) -> dict[str, int]:
        """Bytes of keys and values, and of what the policy needs to know about them."""
        held = self.held
        if held is None:
            return {}
        return {
            "keys and values": storage_nbytes([held.keys, held.values]),
            "scores and positions": storage_nbytes([held.scores, held.positions, held.budget]),
        }


def _joined(held: Held, new: Held) -> Held:
    """What is held, and new tokens behind it."""
    return Held(
        torch.cat([held.keys, new.keys], 2),
        torch.cat([held.values, new.values], 2),
        torch.cat([held.scores, new.scores], 2),
        torch.cat([held.positions, new.positions], 2),
        held.budget,
    )
