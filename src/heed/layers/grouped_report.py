"""What grouped attention (card 46) costs in a model, and how its allocations move while it trains.

    bytes of keys and values = 2 * batch * tokens * G * d * bytes per number        per layer; multi-head has H for G

Khan et al., "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention", 2024 (arXiv 2408.08454).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from heed.catalogue import provides
from heed.layers.grouped import grouped_layers


@provides("46-kdgqa")
class AllocationLog:
    """Records the allocation of every grouped layer: `log(step)` whenever wanted, then `history`.

    Args:
        model: has grouped layers. `steps` (S,) and `history`, name of a layer -> S lists of G counts, are what it keeps.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = grouped_layers(model)
        self.steps: list[int] = []
        self.history: dict[str, list[list[int]]] = {name: [] for name in self.layers}

    def __call__(self, step: int) -> None:
        self.steps.append(step)
        for name, layer in self.layers.items():
            self.history[name].append(layer.allocation.tolist())


@provides("46-kdgqa")
@dataclass(frozen=True)
class GroupedReport:
    """What a model with grouped layers costs.

    Args:
        parameters: of the whole model.
        kv_bytes: keys and values of all grouped layers.
        multi_head_kv_bytes: the same with as many key-value heads as query heads.
        allocations: query heads per key-value head in each layer, now.
    """

    parameters: int
    kv_bytes: int
    multi_head_kv_bytes: int
    allocations: dict[str, list[int]]

    def __str__(self) -> str:
        share = self.kv_bytes / self.multi_head_kv_bytes
        lines = [f"{self.parameters:,} parameters; keys and values {self.kv_bytes:,} bytes ({share:.0%} of multi-head)"]
        return "\n".join(lines + [f"{name}: {counts}" for name, counts in self.allocations.items()])


@provides("46-kdgqa")
def grouped_report(model: nn.Module, tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> GroupedReport:
    """Parameters, memory for keys and values, and allocations.

    Args:
        model: has grouped layers.
        tokens: per sequence, class token included.
        batch: sequences.
        dtype: of keys and values.
    """
    found = grouped_layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no grouped attention layer; convert it first")
    own = {name: layer.kv_cache_bytes(tokens, batch, dtype) for name, layer in found.items()}
    return GroupedReport(
        parameters=sum(p.numel() for p in model.parameters()),
        kv_bytes=sum(own.values()),
        multi_head_kv_bytes=sum(own[name] // layer.num_kv_heads * layer.num_heads for name, layer in found.items()),
        allocations={name: layer.allocation.tolist() for name, layer in found.items()},
    )
