"""Cache layers of transformers that hold less than all keys and values, and the cache made of them.

    update(k, v) -> (B, G, M + N, D)    get_seq_length() = seen tokens    get_mask_sizes(N) = (M + N, seen - M)

M = `attended()`, the columns that stand for the tokens seen before. It equals `seen` where nothing is evicted.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from heed.hosts.rules import AttentionCall
from heed.language.caches.rule import CacheRule
from heed.language.caches.storage import repeat_rows, select_rows, storage_nbytes


class CompressedLayer(CacheLayerMixin):
    """The cache of one attention layer; a subclass says what it holds.

    All tensors are in `held`, nested as the subclass likes, with the batch (or 1, for what a batch shares) as their first
    dimension. Beam search and the like then need nothing more, and `nbytes` tells the truth.

    Args:
        rule: brings the attention calls to `observe`; None where nothing of them is needed.

    Attributes:
        held: what is stored; None when empty.
        seen: tokens since the prompt began, padding included.
        batch: sequences; 0 when empty.
    """

    is_sliding = False

    def __init__(self, rule: CacheRule | None = None) -> None:
        super().__init__()
        self.rule = rule
        self.reset()

    @abstractmethod
    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in new tokens (B, G, N, D), put what is to be kept into `held`, return (B, G, M + N, D) for the attention."""

    def observe(self, call: AttentionCall) -> None:
        """See the attention over what `extend` has just returned; with a rule only. The call's queries are (B, H, N, D)."""
        self.waiting = False

    def attended(self) -> int:
        """M, the columns that `extend` puts before the new tokens."""
        return self.seen

    def parts(self) -> dict[str, int]:
        """Bytes of what is held, by kind."""
        return {"held": self.nbytes}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch, self.is_initialized = key_states.shape[0], True
        self._token_nbytes = sum(x[0, :, 0].numel() * x.element_size() for x in (key_states, value_states))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What transformers' attention layers call: new keys and values (B, G, N, D) in, all of them out.

        The attention over a prompt sees the prompt's own keys and values, whatever the cache makes of them.

        Raises:
            ValueError: another batch than the one in the cache, or nothing has seen the attention of the last step.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch:
            raise ValueError(
                f"this cache holds {self.batch} sequences and is given {key_states.shape[0]}; take a new cache or reset() "
                "for another prompt, batch_select_indices or batch_repeat_interleave for other rows of this one"
            )
        if self.rule is not None:
            self._report(self.rule)
        out = self.extend(key_states.detach(), value_states.detach())
        prompt, self.seen = self.seen == 0, self.seen + key_states.shape[2]
        return (key_states, value_states) if prompt else out

    def _report(self, rule: CacheRule) -> None:
        if rule.removed:
            raise ValueError(
                "the method that made this cache is no longer applied; use the cache inside its `with` block"
            )
        if self.waiting:
            raise ValueError(
                "this cache has not seen the attention of its last step: use it with the model to which its method is "
                "applied (or take a new one, if that step was interrupted)"
            )
        rule.layer, self.waiting = self, True

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use."""
        return storage_nbytes(vars(self))

    @property
    def full_nbytes(self) -> int:
        """Bytes that the seen tokens would take uncompressed, in the dtype of the model."""
        return self.batch * self.seen * self._token_nbytes

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.attended() + query_length, self.seen - self.attended()

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Empty the cache."""
        self.held: Any = None
        self.seen = self.batch = self._token_nbytes = 0
        self.waiting = self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, where that is possible.

        Args:
            tokens_to_remove: a negative number, or 0 for none, as in transformers.

        Raises:
            NotImplementedError: those tokens are no longer held one by one.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to take back")
        if tokens_to_remove < 0 and self.seen:
            tokens = min(-tokens_to_remove, self.seen)
            self.take_back(tokens)
            self.seen -= tokens

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens, if the subclass can."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot take back {tokens} tokens, which are compressed together with others; assisted "
            "generation, which needs that, works with an uncompressed cache"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.seen:
            rows = torch.arange(self.batch)[indices.cpu()]  # numbers of rows, or a mask over them
            self.held = select_rows(self.held, self.batch, rows)
            self.batch = len(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen:
            self.held = repeat_rows(self.held, self.batch, repeats)
            self.batch *= repeats


class CompressedCache(Cache):
    """A cache of transformers with compressed layers: what `past_key_values` takes.

    Layers that a method leaves as they are (sliding windows) are transformers' own, and count in the bytes.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use."""
        return cache_nbytes(self)

    @property
    def full_nbytes(self) -> int:
        """Bytes that the compressed layers' tokens would take uncompressed, and those of the other layers."""
        return sum(
            layer.full_nbytes if isinstance(layer, CompressedLayer) else storage_nbytes(vars(layer))
            for layer in self.layers
        )

    def report(self) -> dict[str, float]:
        """Bytes by kind, all together (`total`), uncompressed (`full`), and how many times smaller that is (`ratio`)."""
        found: dict[str, float] = {}
        for layer in self.layers:
            parts = (
                layer.parts() if isinstance(layer, CompressedLayer) else {"other layers": storage_nbytes(vars(layer))}
            )
            for kind, size in parts.items():
                found[kind] = found.get(kind, 0) + size
        total, full = self.nbytes, self.full_nbytes
        return found | {"total": total, "full": full, "ratio": full / total if total else 1.0}


def cache_nbytes(cache: Cache) -> int:
    """Bytes of memory that any cache of transformers holds."""
    return storage_nbytes([vars(layer) for layer in cache.layers])
