"""Names for attention patterns: which of ten plain patterns a map resembles most.

    s(A) = [self, near, row, column, left, right, up, down, class token: attention that goes there; key-drive]
    name = argmin over plain patterns P of || s(A) - s(P) ||_2

Key-drive is sum_j |m_j - 1/N| / 2 with m the mean over queries of A: 0 when all keys get the same in sum, near 1 when all
queries look at the same few keys. The list of patterns is that of Li et al. (TVCG 2023) as recalled; how a map is matched
to it is heed's own choice.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.explain.heads.profile import Rings

NAMES = ("self", "near", "row", "column", "left", "right", "up", "down", "global", "CLS", "content")
_DRIVEN = 0.75  # key-drive of the plain pattern "content", whose queries share a quarter of the keys


@provides("51-vit-analytics")
def name_patterns(attention: Float[Tensor, "*maps N K"], grid: tuple[int, int], prefix: int = 0) -> list[str]:
    """The plain pattern nearest to each map.

    Args:
        attention: (..., N, K) weights of the patch queries; keys are [prefix tokens, patches].
        grid: rows and columns of patches.
        prefix: tokens before the patches, the class token first.

    Returns:
        Names of `NAMES`, for the maps in order of their flattened leading axes.
    """
    maps = statistics(attention, Rings(grid), prefix)
    return nearest_names(maps.flatten(0, -2) if maps.ndim > 1 else maps[None], grid)


def statistics(attention: Float[Tensor, "*maps N K"], rings: Rings, prefix: int) -> Float[Tensor, "*maps S"]:
    """s(A), see the module."""
    between = attention[..., prefix:].float()
    tokens = between.shape[-1]
    places = torch.stack(_places(rings)).to(between.device).flatten(1).float()  # (8, N N)
    to_places = between.flatten(-2) @ places.T / tokens
    to_class = attention[..., :prefix].float()[..., :1].sum(-1).mean(-1, keepdim=True)
    keys = between.mean(-2)
    keys = keys / keys.sum(-1, keepdim=True).clamp_min(1e-12)
    drive = (keys - 1 / tokens).abs().sum(-1, keepdim=True) / 2
    return torch.cat([to_places, to_class, drive], -1)


def nearest_names(found: Float[Tensor, "maps S"], grid: tuple[int, int]) -> list[str]:
    """The name of the plain pattern nearest to each row of statistics."""
    plain = _plain_statistics(Rings(grid)).to(found)
    return [NAMES[index] for index in torch.cdist(found, plain).argmin(-1).tolist()]


def _places(rings: Rings) -> list[Tensor]:
    """For every plain place, which keys (N, N) it has for each query."""
    down, right, distance = rings.down, rings.right, rings.distance
    return [
        distance == 0,
        (distance == 1) | (distance == 2),
        down == 0,
        right == 0,
        (down == 0) & (right == -1),
        (down == 0) & (right == 1),
        (down == -1) & (right == 0),
        (down == 1) & (right == 0),
    ]


def _plain_statistics(rings: Rings) -> Float[Tensor, "11 S"]:
    """s(P) of every plain pattern, in the order of `NAMES`; a query that lacks the place looks at itself."""
    places = torch.stack(_places(rings)).float()
    itself = torch.eye(places.shape[-1])
    places = torch.where(places.sum(-1, keepdim=True) > 0, places, itself)
    plain = places / places.sum(-1, keepdim=True)
    found = statistics(torch.cat([plain, torch.full_like(plain[:1], 1 / plain.shape[-1])]), rings, 0)
    found[:, -1] = 0  # what the border of the image does to the sums over keys is no choice of keys
    everywhere = found[-1:]
    of_class, content = torch.zeros_like(everywhere), everywhere.clone()
    of_class[:, -2] = 1
    content[:, -1] = _DRIVEN
    return torch.cat([found, of_class, content])
