"""How far each head looks: its attention by rings around the query, and whether it looks the same in every image.

    d(i, j) = max(|row_i - row_j|, |col_i - col_j|)                 ring k: the patches at d = k, k = 0 the patch itself
    ring_total[k] = mean over patch queries of sum_{d(i, j) = k} A[i, j]     sum_k ring_total + patch_to_prefix = 1
    ring_mean[k]  = mean over the queries that have ring k of (ring's sum / its patches inside the image)
    mean_distance = mean over patch queries of sum_j A[i, j] |i - j| / sum_j A[i, j]   over patches j, euclidean
    entropy       = mean over all queries of -sum_j A[i, j] log(A[i, j] + 1e-12)
    content_agnostic = mean over pairs of images of the Pearson correlation of the patch-patch maps

After Li et al., "How Does Attention Work in Vision Transformers?" (TVCG 2023), whose k-hop neighbours are the rings.
There is no code of the authors, so the formulas are heed's own reading. All are running sums: no map is kept.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.explain.vit import check_grid


class Rings:
    """Distances between the patches of a grid.

    Args:
        grid: rows and columns of patches.

    Attributes:
        count: K, how many rings there are.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        rows, columns = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        self.down = rows - rows[:, None]  # (N, N): how far the key lies below the query
        self.right = columns - columns[:, None]
        self.distance = torch.maximum(self.down.abs(), self.right.abs())
        self.count = max(grid)

    @cached_property
    def members(self) -> Float[Tensor, "N N K"]:
        """1 where the key is in ring k of the query."""
        return (self.distance[..., None] == torch.arange(self.count)).float()

    @property
    def sizes(self) -> Float[Tensor, "N K"]:
        """Patches of ring k that lie inside the image."""
        return self.members.sum(1)

    @cached_property
    def weights(self) -> Float[Tensor, "NN K2"]:
        """What a flattened map is multiplied with: [K columns for ring_total, K columns for ring_mean]."""
        tokens = len(self.distance)
        queries = (self.sizes > 0).sum(0)  # a grid has at least one query for each of its rings
        mean = self.members / self.sizes.clamp_min(1)[:, None] / queries
        return torch.cat([self.members / tokens, mean], -1).flatten(0, 1)

    @property
    def euclidean(self) -> Float[Tensor, "N N"]:
        return (self.down.square() + self.right.square()).float().sqrt()


@provides("51-vit-analytics")
@dataclass(frozen=True)
class StrengthProfile:
    """Where attention goes, per head; `...` are the leading axes of what was measured, (L, H) for a model.

    Args:
        ring_total, ring_mean: (..., K) of the patch queries.
        patch_to_cls: (...) to the class token, 0 where there is none; patch_to_other to the other prefix tokens.
        cls_to_patches, cls_to_cls: (...) of the class token; NaN where it is absent.
        mean_distance: (...) in patches.
        entropy: (...) in nats, over all queries given.
    """

    ring_total: Float[Tensor, "*heads K"]
    ring_mean: Float[Tensor, "*heads K"]
    patch_to_cls: Float[Tensor, "*heads"]
    patch_to_other: Float[Tensor, "*heads"]
    cls_to_patches: Float[Tensor, "*heads"]
    cls_to_cls: Float[Tensor, "*heads"]
    mean_distance: Float[Tensor, "*heads"]
    entropy: Float[Tensor, "*heads"]

    def trend(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Every quantity across layers: its mean and its standard deviation over heads, (L,) or (L, K)."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: (value.mean(1), value.std(1, correction=0)) for name, value in values.items()}


@provides("51-vit-analytics")
def strength_profile(
    attention: Float[Tensor, "*heads Q K"], grid: tuple[int, int] | None = None, *, prefix: int | None = None
) -> StrengthProfile:
    """The strength profile of attention maps, each on its own.

    Args:
        attention: (..., Q, K) weights; keys are [prefix tokens, patches], queries the same or the patches alone.
        grid: rows and columns of patches; None where they are a square.
        prefix: tokens before the patches; None for what the grid leaves, of which the first is the class token.

    Raises:
        ValueError: the grid does not fit, or is needed.
    """
    keys = attention.shape[-1]
    grid = check_grid(grid, keys, prefix)
    return profile(attention, Rings(grid), keys - grid[0] * grid[1])


def profile(attention: Float[Tensor, "*heads Q K"], rings: Rings, prefix: int) -> StrengthProfile:
    """`strength_profile` with the rings of the grid."""
    attention = attention.float()
    patches, device = len(rings.distance), attention.device
    if attention.shape[-2] not in (patches, patches + prefix):
        raise ValueError(
            f"attention {tuple(attention.shape)} has {attention.shape[-2]} queries; give those of all "
            f"{patches + prefix} tokens or of the {patches} patches"
        )
    from_patches = attention[..., -patches:, :]
    between = from_patches[..., prefix:]
    weighted = between.flatten(-2) @ rings.weights.to(device)
    total, mean = weighted.split(rings.count, -1)
    to_prefix = from_patches[..., :prefix].mean(-2)
    distances = (between * rings.euclidean.to(device)).sum(-1) / between.sum(-1).clamp_min(1e-12)
    absent = torch.full_like(distances.mean(-1), torch.nan)
    of_class = attention[..., 0, :] if prefix and attention.shape[-2] > patches else None
    return StrengthProfile(
        ring_total=total,
        ring_mean=mean,
        patch_to_cls=to_prefix[..., :1].sum(-1),
        patch_to_other=to_prefix[..., 1:].sum(-1),
        cls_to_patches=absent if of_class is None else of_class[..., prefix:].sum(-1),
        cls_to_cls=absent if of_class is None else of_class[..., 0],
        mean_distance=distances.mean(-1),
        entropy=-(attention * (attention + 1e-12).log()).sum(-1).mean(-1),
    )


class ProfileSums:
    """Running means of the strength profile over images, per layer and head: O(L H K) memory."""

    def __init__(self, layers: int, rings: Rings, prefix: int) -> None:
        self.rings, self.prefix = rings, prefix
        self._sums: list[dict[str, Tensor]] = [{} for _ in range(layers)]
        self._images = [0] * layers

    def add(self, layer: int, attention: Float[Tensor, "B H N M"]) -> None:
        """Take in one layer of one batch."""
        found = profile(attention, self.rings, self.prefix)
        for field in dataclasses.fields(found):
            value = getattr(found, field.name).double().sum(0).cpu()
            sums = self._sums[layer]
            sums[field.name] = sums[field.name] + value if field.name in sums else value
        self._images[layer] += len(attention)

    def result(self) -> StrengthProfile:
        """Of all images so far, (L, H) and (L, H, K)."""
        means = [
            {name: value / images for name, value in sums.items()}
            for sums, images in zip(self._sums, self._images, strict=True)
        ]
        return StrengthProfile(**{name: torch.stack([mean[name] for mean in means]).float() for name in means[0]})


class AgreementSums:
    """Running sums for the content-agnostic score: one map per head, whatever the number of images.

    mean over pairs a < b of <u_a, u_b> = (|sum_b u_b|^2 - sum_b |u_b|^2) / (B (B - 1)),    u the normalised map
    """

    def __init__(self, layers: int, prefix: int) -> None:
        self.prefix = prefix
        self._directions: list[Tensor | None] = [None] * layers
        self._squares: list[Tensor | float] = [0.0] * layers
        self._images = 0

    def add(self, layer: int, attention: Float[Tensor, "B H N M"]) -> None:
        """Take in one layer of one batch."""
        maps = attention[..., self.prefix :, self.prefix :].float().flatten(2)
        maps = maps - maps.mean(-1, keepdim=True)
        maps = maps / maps.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        before = self._directions[layer]
        self._directions[layer] = maps.sum(0) if before is None else before + maps.sum(0)
        self._squares[layer] = self._squares[layer] + maps.double().square().sum((0, 2))
        self._images += len(maps) if layer == 0 else 0

    def result(self) -> Float[Tensor, "L H"]:
        """1 for heads with the same map in every image; NaN from a single image."""
        if self._images < 2:
            return torch.stack([torch.full(d.shape[:1], torch.nan) for d in self._directions if d is not None])
        pairs = self._images * (self._images - 1)
        scores = [
            (directions.double().square().sum(-1) - squares) / pairs
            for directions, squares in zip(self._directions, self._squares, strict=True)
            if directions is not None
        ]
        return torch.stack(scores).float().cpu()
