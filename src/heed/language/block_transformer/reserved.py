"""Keys and values of one generation in memory reserved once: a `Cache` of transformers without a copy per step (card 15).

    update(k, v): keys[:, :, t : t + N] = k; returns keys[:, :, : t + N]       views (B, H, t + N, D)

DynamicCache copies all it holds with every step, which costs most where a step is a single token of a short block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class ReservedLayer(DynamicLayer):
    """One layer; `capacity` positions, and twice as many whenever they do not suffice. `reset` keeps the memory.

    Batches may shrink after a reset: fewer rows than reserved use the first ones.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            x.new_empty(*x.shape[:2], max(self.capacity, x.shape[2]), x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, _, new, _ = key_states.shape
        if not self.is_initialized or (self.length == 0 and rows > self.keys.shape[0]):
            self.lazy_initialization(key_states, value_states)
        begin, self.length = self.length, self.length + new
        if self.length > self.keys.shape[2]:
            self.keys, self.values = (_longer(x, max(self.length, 2 * x.shape[2])) for x in (self.keys, self.values))
        keys, values = self.keys[:rows, :, : self.length], self.values[:rows, :, : self.length]
        keys[:, :, begin:], values[:, :, begin:] = key_states, value_states
        return keys, values

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0 or -tokens_to_remove > self.length:
            raise ValueError(
                f"crop({tokens_to_remove}): give minus the number of positions to remove, of {self.length}"
            )
        self.length += tokens_to_remove


class ReservedCache(Cache):
    """A layer of `capacity` positions for each attention layer; `nbytes` counts the reserved memory."""

    layers: list[ReservedLayer]

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[ReservedLayer(capacity) for _ in range(layers)])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values))


def _longer(x: Tensor, length: int) -> Tensor:
    longer = x.new_empty(*x.shape[:2], length, x.shape[3])
    longer[:, :, : x.shape[2]] = x
    return longer
