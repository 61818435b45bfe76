"""One pass over the images that gathers everything about attention itself, layer by layer as it is formed.

    displacement[l, h, dy, dx] = mean over images and pairs (i, j = i + (dy, dx)) of A[i, j]

Kept are running sums, the prepared maps of a few images for the patterns, and a few rows to show beside their images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heed.explain.attention import evaluating
from heed.explain.batches import Batch
from heed.explain.heads.names import nearest_names, statistics
from heed.explain.heads.patterns import prepare_maps
from heed.explain.heads.profile import AgreementSums, ProfileSums, Rings, StrengthProfile
from heed.explain.heads.watch import WatchAttention
from heed.explain.vit import Vit
from heed.methods import apply

SHOWN = 4  # images whose attention from the middle is kept to be shown


@dataclass(frozen=True, eq=False)
class Collected:
    """What one pass gathered.

    Args:
        profile: (L, H) strength profile.
        content_agnostic: (L, H), NaN from a single image.
        displacement: (L, H, 2 gh - 1, 2 gw - 1), the query in the middle.
        head_patterns: (L * H,) the plain pattern each head resembles, from its mean statistics.
        maps: (n, 48, 48) prepared maps, and per map its head l * H + h and its statistics.
        map_heads: (n,) which head each map comes from.
        map_statistics: (n, S).
        shown: (m, C, height, width) the first images.
        rows: (L, H, m, gh, gw) attention from the patch in the middle of the shown images.
    """

    profile: StrengthProfile
    content_agnostic: Float[Tensor, "L H"]
    displacement: Float[Tensor, "L H dy dx"]
    head_patterns: tuple[str, ...]
    maps: Float[Tensor, "n 48 48"]
    map_heads: Int[Tensor, " n"]
    map_statistics: Float[Tensor, "n S"]
    shown: Float[Tensor, "m C height width"]
    rows: Float[Tensor, "L H m gh gw"]


def collect(vit: Vit, batches: Sequence[Batch], maps_per_head: int = 0, seed: int = 0) -> Collected:
    """Run the model over all images once.

    Args:
        vit: the model.
        batches: the images.
        maps_per_head: images, chosen by chance, whose maps are kept.
        seed: of that choice.

    Raises:
        RuntimeError: a layer's attention ran without forming its weights.
    """
    total = sum(len(batch.images) for batch in batches)
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:maps_per_head]
    sums = _Sums(vit, chosen)
    with evaluating(vit.model), torch.no_grad(), apply(vit.model, WatchAttention(sums.see)):
        for batch in batches:
            sums.begin(len(batch.images))
            vit.predict(batch.images)
            sums.end()
    return sums.result(torch.cat([batch.images[:SHOWN] for batch in batches])[:SHOWN].cpu())


class _Sums:
    def __init__(self, vit: Vit, chosen: Tensor) -> None:
        self.vit, self.rings, self.chosen = vit, Rings(vit.grid), chosen
        self.layer_of = {number: layer for layer, number in enumerate(vit.numbers)}
        self.profile = ProfileSums(vit.layers, self.rings, vit.prefix)
        self.agreement = AgreementSums(vit.layers, vit.prefix)
        rows, columns = vit.grid
        self.shape = 2 * rows - 1, 2 * columns - 1
        self.place = ((self.rings.down + rows - 1) * self.shape[1] + self.rings.right + columns - 1).flatten()
        self.displacement = torch.zeros(vit.layers, vit.heads, self.shape[0] * self.shape[1], dtype=torch.float64)
        self.statistics: list[Tensor | float] = [0.0] * vit.layers
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []  # maps, their heads, their statistics
        self.rows: list[list[Tensor]] = [[] for _ in range(vit.layers)]
        self.first, self.size, self.seen = 0, 0, set()

    def begin(self, size: int) -> None:
        self.size, self.seen = size, set()

    def see(self, number: int, weights: Float[Tensor, "B H N M"]) -> None:
        layer = self.layer_of[number]
        if weights.shape[-1] != self.vit.tokens:
            raise ValueError(
                f"a batch has images of {weights.shape[-1]} tokens, the first had {self.vit.tokens}; resize all alike"
            )
        self.seen.add(number)
        self.profile.add(layer, weights)
        self.agreement.add(layer, weights)
        prefix, heads = self.vit.prefix, weights.shape[1]
        queries = weights[..., prefix:, :]
        between = queries[..., prefix:].float()
        by_place = between.sum(0).flatten(1).double().cpu()
        self.displacement[layer].index_add_(1, self.place, by_place)
        found = statistics(queries, self.rings, prefix).cpu()
        self.statistics[layer] = self.statistics[layer] + found.double().sum(0)
        here = self.chosen[(self.chosen >= self.first) & (self.chosen < self.first + self.size)] - self.first
        if len(here):
            head_numbers = (layer * heads + torch.arange(heads)).repeat(len(here))
            self.kept.append((prepare_maps(between[here]).flatten(0, 1).cpu(), head_numbers, found[here].flatten(0, 1)))
        room = SHOWN - self.first
        if room > 0:
            rows, columns = self.vit.grid
            middle = (rows // 2) * columns + columns // 2
            self.rows[layer].append(between[:room, :, middle].unflatten(-1, self.vit.grid).transpose(0, 1).cpu())

    def end(self) -> None:
        missed = [layer for number, layer in self.layer_of.items() if number not in self.seen]
        if missed:
            raise RuntimeError(
                f"layer {missed[0]} computed its attention without forming the weights: fused attention is forced on; "
                "switch to eager attention, with model.set_attn_implementation('eager') in transformers or "
                "layer.fused_attn = False in timm, and let nothing switch it back while the model runs"
            )
        self.first += self.size

    def result(self, shown: Tensor) -> Collected:
        pairs = torch.zeros(self.displacement.shape[-1]).index_add_(0, self.place, torch.ones(len(self.place)))
        means = torch.stack([torch.as_tensor(found) for found in self.statistics]) / self.first
        nothing = torch.zeros(0, 48, 48), torch.zeros(0, dtype=torch.long), torch.zeros(0, means.shape[-1])
        maps, heads, found = (
            torch.cat(parts) for parts in (zip(*self.kept, strict=True) if self.kept else zip(nothing))
        )
        return Collected(
            profile=self.profile.result(),
            content_agnostic=self.agreement.result(),
            displacement=(self.displacement / pairs / self.first).float().unflatten(-1, self.shape),
            head_patterns=tuple(nearest_names(means.flatten(0, 1).float(), self.vit.grid)),
            maps=maps,
            map_heads=heads,
            map_statistics=found,
            shown=shown,
            rows=torch.stack([torch.cat(parts, 1) for parts in self.rows]),
        )
