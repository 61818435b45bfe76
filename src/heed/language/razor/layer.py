"""RazorAttention's cache layer: retrieval heads with every token, the other heads with a few and a compensation token.

    held = {full: (B, R, seen, D) keys and values of the R retrieval heads,  stores: a WindowStore for every kind of window}

New tokens join when their attention is computed, since only that knows which are padding; after it the stores are compressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from heed.catalogue import provides
from heed.hosts.rules import AttentionCall
from heed.language.caches.layer import CompressedLayer
from heed.language.caches.rule import CacheRule
from heed.language.caches.storage import storage_nbytes
from heed.language.razor.method import Razor
from heed.language.razor.rule import attend_columns, column_bias
from heed.language.razor.store import WindowStore
from heed.language.saliency import real_tokens


class FullLayer(CompressedLayer):
    """Every key and value, as they are: what retrieval heads have, unless another method holds them.

    `held` is (keys, values), both (B, R, seen, D).
    """

    held: tuple[Tensor, Tensor] | None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.held is None:
            self.held = keys.clone(), values.clone()  # and not views that keep the other heads alive
        else:
            self.held = torch.cat([self.held[0], keys], 2), torch.cat([self.held[1], values], 2)
        return self.held

    def take_back(self, tokens: int) -> None:
        if self.held is not None:
            self.held = self.held[0][:, :, :-tokens].clone(), self.held[1][:, :, :-tokens].clone()


@dataclass(frozen=True)
class Held:
    """What a layer stores.

    Attributes:
        full: what the layer of the retrieval heads holds; None where there are none.
        stores: of the other heads, in the order of `RazorLayer.groups`.
    """

    full: Any
    stores: tuple[WindowStore, ...]


@provides("65-razor")
class RazorLayer(CompressedLayer):
    """The cache of one attention layer; `Razor` makes it.

    Args:
        settings: the method.
        index: number of the layer.
        rule: computes the attention.

    Attributes:
        heads: the retrieval heads.
        groups: the other heads, those with one budget together, and their budgets.
        full: the cache layer of the retrieval heads.
    """

    held: Held | None

    def __init__(self, settings: Razor, index: int, rule: CacheRule | None) -> None:
        self.settings = settings
        self.heads, self.groups = settings.chosen.layers[index], settings.groups(index)
        # What another method does with the retrieval heads, it does in a call of their own.
        self._inner = CacheRule()
        self.full = FullLayer() if settings.store is None else settings.store.layer(index, self._inner)
        super().__init__(rule)

    def reset(self) -> None:
        super().reset()
        self.full.reset()
        self._new: tuple[Tensor, Tensor] | None = None  # this step's tokens, until their attention
        self._all: tuple[Tensor, Tensor] | None = None  # and those of the retrieval heads with all before
        self._since = 0  # tokens since the last compression

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._new = keys, values
        if self.heads:
            self._all = self.full.update(_heads(keys, self.heads), _heads(values, self.heads))
        return keys, values

    def attend(self, call: AttentionCall) -> Tensor | None:
        """The heads' outputs (B, N, H, E) for N new tokens; None for a prompt, whose attention is as ever.

        Raises:
            NotImplementedError: several tokens at once with a mask that is more than causality and padding.
        """
        if call.options.get("s_aux") is not None:
            raise ValueError(f"{type(call.module).__name__} has learned attention sinks (s_aux), which Razor cannot do")
        if self.held is None:
            return None
        real, biased = _real(call), _is_biased(call)
        if not biased and call.query.shape[2] > 1 and call.mask is not None:
            _check_causal(call.mask, real)
        held = self.held = self._taken(real)
        query = call.query.unflatten(1, (call.key.shape[1], -1))  # (B, G, H / G, N, D)
        out = query.new_empty(*query.shape[:-1], call.value.shape[-1])

        def compute(heads: tuple[int, ...], keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
            part = call.replace(query=_heads(query, heads).flatten(1, 2), key=keys, value=values)
            out[:, list(heads)] = attend_columns(part, bias).unflatten(1, (len(heads), -1))

        if self._all is not None:
            padding = None if real is None else torch.zeros_like(real, dtype=query.dtype).masked_fill(~real, -torch.inf)
            full = None if padding is None else padding[:, None, None]
            compute(self.heads, *self._all, self._host_bias(call, self.heads) if biased else full)
        for (heads, _), store in zip(self.groups, held.stores, strict=True):
            bias = column_bias(store, query.dtype)
            if biased:
                bias = _at_columns(self._host_bias(call, heads), store)
            compute(heads, store.keys, store.values, bias)
        return out.flatten(1, 2).transpose(1, 2)

    def observe(self, call: AttentionCall) -> None:
        super().observe(call)
        first, tokens = self.held is None, call.query.shape[2]
        if first:
            self.held = self._taken(_real(call))
        if self._inner.layer is not None and self._all is not None:
            query = _heads(call.query.unflatten(1, (call.key.shape[1], -1)), self.heads).flatten(1, 2)
            self._inner.after(call.replace(query=query, key=self._all[0], value=self._all[1]), query.transpose(1, 2))
        self._all = None
        self._since += tokens
        if first or tokens > 1 or (self.settings.policy == "rolling" and self._since >= self.settings.interval):
            self._since = 0
            self._compress()
        elif self.held is not None:
            self.held = replace(self.held, full=self.full.held)

    def _taken(self, real: Tensor | None) -> Held:
        """What is held, and the new tokens."""
        assert self._new is not None  # there is an attention after every update alone
        (keys, values), self._new = self._new, None
        tokens = keys.shape[2]
        new = None if real is None or bool(real[:, -tokens:].all()) else real[:, -tokens:]
        stores = []
        for number, (heads, _) in enumerate(self.groups):
            part = _heads(keys, heads), _heads(values, heads)
            store = WindowStore.empty(*part) if self.held is None else self.held.stores[number]
            stores.append(store.append(*part, self.seen - tokens, new))
        return Held(self.full.held, tuple(stores))

    @torch.no_grad()
    def _compress(self) -> None:
        if self.held is not None:
            stores = (store.compress(budget) for (_, budget), store in zip(self.groups, self.held.stores, strict=True))
            self.held = Held(self.full.held, tuple(stores))

    def _host_bias(self, call: AttentionCall, heads: tuple[int, ...]) -> Tensor:
        """The host's additive mask of some heads (B, h, N, K)."""
        batch, queries = call.query.shape[0], call.query.shape[1]
        mask = call.mask.expand(batch, queries, -1, -1)  # type: ignore[union-attr]
        return _heads(mask.unflatten(1, (call.key.shape[1], -1)), heads).flatten(1, 2)

    def take_back(self, tokens: int) -> None:
        if self.held is None:
            return
        seen = self.seen - tokens
        stores = [
            store.crop(seen, budget.sinks) for (_, budget), store in zip(self.groups, self.held.stores, strict=True)
        ]
        kept = tuple(store for store in stores if store is not None)
        if len(kept) < len(stores):
            super().take_back(tokens)
        if self.heads:
            self.full.crop(-tokens)
        self.held = Held(self.full.held, kept)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._share()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._share()

    def _share(self) -> None:
        """The layer of the retrieval heads holds what has just been changed in `held`."""
        if self.held is not None and self.heads:
            self.full.held, self.full.batch = self.held.full, self.batch

    def parts(self) -> dict[str, int]:
        """Bytes of the retrieval heads, of the other heads, of their means in float32, and of positions and counts."""
        if self.held is None:
            return {}
        found = {"retrieval heads": storage_nbytes(self.held.full)}
        for store in self.held.stores:
            for kind, size in store.parts().items():
                found[kind] = found.get(kind, 0) + size
        return found


def _heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of x (B, G, ...), a view where they lie side by side."""
    if len(heads) == x.shape[1]:
        return x
    if heads[-1] - heads[0] + 1 == len(heads):
        return x[:, heads[0] : heads[-1] + 1]
    return x[:, list(heads)]


def _real(call: AttentionCall) -> Tensor | None:
    """(B, K), False for padding; None for none. The call has the new keys only, and a mask for all of them."""
    if call.mask is None:
        return None
    keys = call.key[:, :1, :1].expand(-1, -1, call.mask.shape[-1], -1)
    return real_tokens(call.replace(key=keys))


def _is_biased(call: AttentionCall) -> bool:
    """Whether the host adds something to its scores, such as ALiBi."""
    if call.mask is None or not call.mask.is_floating_point():
        return False
    return bool((call.mask[call.allowed().expand_as(call.mask)] != 0).any())  # type: ignore[union-attr]


def _check_causal(mask: Tensor, real: Tensor | None) -> None:
    """NotImplementedError unless the mask (B, 1, N, K) is causality and padding."""
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    queries, keys = mask.shape[2:]
    wanted = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    if real is not None:
        wanted = wanted & real[:, None, None]
    wrong = (allowed != wanted) & wanted.any(-1, keepdim=True)  # what sees no token may see anything
    if bool(wrong.any()):
        raise NotImplementedError(
            "the mask of these tokens is more than causality and padding (several documents in one row, a tree of tokens), "
            "and the cache no longer holds every token for it; give such tokens one by one, or in a prompt of their own"
        )


def _at_columns(bias: Tensor, store: WindowStore) -> Tensor:
    """The host's biases (B, h, N, K) at the columns of a store; the compensation token has the mean of what it stands for."""
    seen = bias > torch.finfo(bias.dtype).min / 2
    at = store.at[:, None, None].long()
    picked = bias.take_along_dim(at.clamp(min=0), -1).masked_fill(at < 0, -torch.inf)
    if store.extra:
        kept = picked[..., 1:].masked_fill(picked[..., 1:] < torch.finfo(bias.dtype).min / 2, 0).float().sum(-1)
        everything = bias.masked_fill(~seen, 0).float().sum(-1)
        dropped = store.dropped[:, None, None]
        column = (everything - kept) / dropped.clamp(min=1) + dropped.clamp(min=1).float().log()
        picked[..., 0] = column.masked_fill(dropped == 0, -torch.inf).to(bias.dtype)
    return picked
