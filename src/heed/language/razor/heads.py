"""Which heads keep everything: the list of retrieval heads of a model, as it is saved, loaded and given to `Razor`.

    {"kv_heads": 8, "layers": [[0, 5], [], [2], ...]}            as JSON: numbers of key-value heads, layer by layer

Tang et al., "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads", ICLR 2025, arXiv 2407.15891.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool
from torch import Tensor

from heed.catalogue import provides


@provides("65-razor")
@dataclass(frozen=True)
class RetrievalHeads:
    """The key-value heads that keep the whole cache.

    Args:
        layers: their numbers in every layer of the model, from 0; an empty tuple for none.
        kv_heads: key-value heads of a layer.
        windows: last tokens that matter to each head of each layer, where that is known (`alibi_windows`): a head that is
            no retrieval head keeps so many. None for as many as `Razor` says.

    Raises:
        ValueError: no layers, a head that does not exist, or windows that are not one for each head.
    """

    layers: tuple[tuple[int, ...], ...]
    kv_heads: int
    windows: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if not self.layers or self.kv_heads < 1:
            raise ValueError(f"a model with {len(self.layers)} layers of {self.kv_heads} key-value heads has no heads")
        object.__setattr__(self, "layers", tuple(tuple(sorted({int(h) for h in heads})) for heads in self.layers))
        for number, heads in enumerate(self.layers):
            if heads and not 0 <= heads[0] <= heads[-1] < self.kv_heads:
                raise ValueError(
                    f"layer {number} has no heads {list(heads)}; they are numbered 0 to {self.kv_heads - 1}"
                )
        if self.windows is not None:
            object.__setattr__(self, "windows", tuple(map(tuple, self.windows)))
            if [len(row) for row in self.windows] != [self.kv_heads] * len(self.layers) or min(
                map(min, self.windows)
            ) < 1:
                raise ValueError(
                    f"windows={self.windows} must be {self.kv_heads} positive numbers for each of {len(self.layers)} layers"
                )

    @property
    def count(self) -> int:
        """Retrieval heads of the model."""
        return sum(map(len, self.layers))

    @property
    def ratio(self) -> float:
        """Their share of all key-value heads."""
        return self.count / (len(self.layers) * self.kv_heads)

    def others(self, layer: int) -> tuple[int, ...]:
        """The heads of a layer that are no retrieval heads."""
        return tuple(head for head in range(self.kv_heads) if head not in self.layers[layer])

    def mask(self) -> Bool[Tensor, "L G"]:
        """(layers, kv_heads), True for retrieval heads."""
        mask = torch.zeros(len(self.layers), self.kv_heads, dtype=torch.bool)
        for number, heads in enumerate(self.layers):
            mask[number, list(heads)] = True
        return mask

    @classmethod
    def of(cls, mask: Bool[Tensor, "L G"]) -> Self:
        """From a mask (layers, kv_heads), True for retrieval heads."""
        return cls(tuple(tuple(row.nonzero().flatten().tolist()) for row in mask), mask.shape[1])

    def save(self, path: Path | str) -> None:
        """Write the list as JSON."""
        found = {"kv_heads": self.kv_heads, "layers": self.layers}
        Path(path).write_text(json.dumps(found if self.windows is None else found | {"windows": self.windows}) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        found = json.loads(Path(path).read_text())
        if not isinstance(found, dict) or not {"kv_heads", "layers"} <= set(found):
            raise ValueError(
                f"{path} is no list of retrieval heads: it needs kv_heads and layers; see RetrievalHeads.save"
            )
        return cls(tuple(map(tuple, found["layers"])), found["kv_heads"], found.get("windows"))

    @classmethod
    def load_tool(cls, path: Path | str, layers: int, kv_heads: int) -> Self:
        """Read the head list of the authors' tool (msmodelslim), a `.pt` file with tensors and plain containers only.

        It maps "prefix_matching" and "copying" each to {layer: [key-value heads]}; retrieval heads are both together.

        Args:
            path: the file.
            layers, kv_heads: of the model, which the file does not say.

        Raises:
            ValueError: the file holds something else, or heads that the model does not have.
        """
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not {"prefix_matching", "copying"} & set(found):
            raise ValueError(f"{path} is no head list of the tool: it has neither 'prefix_matching' nor 'copying'")
        chosen: list[set[int]] = [set() for _ in range(layers)]
        for kind in ("prefix_matching", "copying"):
            for layer, heads in found.get(kind, {}).items():
                if not 0 <= int(layer) < layers:
                    raise ValueError(
                        f"{path} lists layer {layer}; the model has {layers} layers: another model's list?"
                    )
                chosen[int(layer)].update(map(int, _numbers(heads)))
        return cls(tuple(map(tuple, chosen)), kv_heads)

    def check(self, config: Any) -> None:
        """ValueError unless a decoder's config has so many layers and key-value heads."""
        layers = config.num_hidden_layers
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if (layers, kv_heads) != (len(self.layers), self.kv_heads):
            raise ValueError(
                f"the head list is of a model with {len(self.layers)} layers of {self.kv_heads} key-value heads, this one "
                f"has {layers} of {kv_heads}; profile this model: heed.language.razor.profile_heads(model).select()"
            )


def _numbers(heads: Any) -> Iterable[Any]:
    return heads.flatten().tolist() if isinstance(heads, Tensor) else heads
