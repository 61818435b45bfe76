"""ZipCache's cache layer: packed history, full-precision tail, and when the one becomes the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heed.catalogue import provides
from heed.hosts.rules import AttentionCall
from heed.language.caches.layer import CompressedLayer
from heed.language.caches.rule import CacheRule
from heed.language.caches.storage import storage_nbytes
from heed.language.saliency import probe_saliency, real_tokens
from heed.language.zipcache.method import ZipCache
from heed.language.zipcache.store import MixedStore


@dataclass(frozen=True)
class Held:
    """What a layer stores.

    Attributes:
        keys, values: the packed tokens; None before the first compression.
        tail_keys, tail_values: (B, G, T, D), the tokens after them in full precision.
    """

    keys: MixedStore | None
    values: MixedStore | None
    tail_keys: Tensor
    tail_values: Tensor


@provides("34-zipcache")
class ZipLayer(CompressedLayer):
    """The cache of one attention layer; `ZipCache` makes it.

    A prompt is compressed after its attention; later tokens wait in the tail, in full precision, until there are `gap` of
    them. Then all that is held is compressed again, the tail's regular tokens being those of least saliency under the
    queries of that step: in generation a single one. As in the authors' code, the history is quantised anew each time, and a
    token once regular stays so.

    Args:
        settings: the method.
        index: number of the layer.
        rule: brings the queries; None where none are needed.
    """

    held: Held | None

    def __init__(self, settings: ZipCache, index: int, rule: CacheRule | None) -> None:
        self.settings, self.index = settings, index
        super().__init__(rule)

    def reset(self) -> None:
        super().reset()
        # All keys and values, while they wait for this step's attention before they are compressed.
        self._due: tuple[Tensor, Tensor] | None = None
        self._compressions = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        held = self.held
        if held is None:
            self.held, full, due = Held(None, None, keys, values), (keys, values), True
        else:
            tail = torch.cat([held.tail_keys, keys], 2), torch.cat([held.tail_values, values], 2)
            full = _joined(held.keys, tail[0]), _joined(held.values, tail[1])
            self.held = replace(held, tail_keys=tail[0], tail_values=tail[1])
            due = tail[0].shape[2] >= self.settings.gap
        if due:
            self._due = full
            if self.rule is None:
                self._compress(None)
        return full

    def observe(self, call: AttentionCall) -> None:
        super().observe(call)
        if self._due is not None:
            self._compress(call)

    @torch.no_grad()
    def _compress(self, call: AttentionCall | None) -> None:
        """Quantise all tokens; the call says which are padding, and its queries which of the new ones are regular."""
        if self._due is None or self.held is None:
            return
        full, held, self._due = self._due, self.held, None
        begin = 0 if held.keys is None else held.keys.length
        tokens = None if call is None else real_tokens(call)
        fractions = self.settings.fractions
        if begin == 0 or fractions[0] == fractions[1]:  # one list for keys and values
            fractions = fractions[:1]
        saliency = None
        if call is not None and any(fractions):
            saliency = self._saliency(call.replace(key=full[0], value=full[1]), tokens)
        lists = []
        for fraction, store in zip(fractions, (held.keys, held.values), strict=False):
            new = _least(saliency, full[0], tokens, fraction, begin)
            lists.append(_narrow(new if store is None else torch.cat([store.ids.long(), new], -1), full[0].shape[2]))
        keys, values = (
            MixedStore.of(x, ids, precision, tokens)
            for x, ids, precision in zip(full, (lists[0], lists[-1]), self.settings.precisions, strict=True)
        )
        self._compressions += 1
        self.held = Held(keys, values, *(x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in full))

    def _saliency(self, call: AttentionCall, tokens: Tensor | None) -> Tensor:
        """(B, G, N) of all tokens, from the probes among the queries of the call."""
        settings, queries = self.settings, call.query.shape[2]
        counts = [queries] if tokens is None else tokens[:, -queries:].sum(-1).tolist()
        rows = [settings.probe_rows(count, self.index, self._compressions) for count in counts]
        return probe_saliency(call, rows, tokens, settings.saliency)

    def take_back(self, tokens: int) -> None:
        if self.held is None or tokens > self.held.tail_keys.shape[2]:
            super().take_back(tokens)
        else:
            tail = (x[:, :, :-tokens].clone() for x in (self.held.tail_keys, self.held.tail_values))
            self.held = Held(self.held.keys, self.held.values, *tail)

    def parts(self) -> dict[str, int]:
        """Bytes of the packed codes, of their parameters, of the lists of regular tokens (and padding), and of the tail."""
        held = self.held
        if held is None:
            return {}
        stores = [store for store in (held.keys, held.values) if store is not None]
        tables = [table for store in stores for table in (store.salient, store.regular) if table is not None]
        return {
            "codes": storage_nbytes([table.packed for table in tables]),
            "parameters": storage_nbytes([[table.low, table.step, table.scale] for table in tables]),
            "lists": storage_nbytes([[store.ids, store.tokens] for store in stores]),
            "tail": storage_nbytes([held.tail_keys, held.tail_values]),
        }


def _joined(store: MixedStore | None, tail: Tensor) -> Tensor:
    return tail if store is None else torch.cat([store.dequantise(), tail], 2)


def _least(saliency: Tensor | None, keys: Tensor, tokens: Tensor | None, fraction: float, begin: int) -> Tensor:
    """Positions (B, G, r) of the int(fraction n) least salient of the n tokens from `begin` on; -1 to fill up a row."""
    batch, groups, length, _ = keys.shape
    counts = torch.full((batch, 1, 1), length - begin)
    if tokens is not None:
        counts = tokens[:, begin:].sum(-1).cpu()[:, None, None]
    counts = counts.double().mul(fraction).long()  # rounds down
    most = int(counts.max())
    if saliency is None or most == 0:
        return torch.empty(batch, groups, 0, dtype=torch.long, device=keys.device)
    ids = saliency[..., begin:].topk(most, largest=False, sorted=True).indices + begin
    return (
        ids if tokens is None else ids.masked_fill(torch.arange(most, device=ids.device) >= counts.to(ids.device), -1)
    )


def _narrow(ids: Tensor, length: int) -> Tensor:
    """Positions below `length` in the fewest bytes."""
    return ids.to(torch.int16 if length <= torch.iinfo(torch.int16).max else torch.int32)
