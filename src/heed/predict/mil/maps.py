"""Attention to look at: a score per instance, its map over a slide, and how few instances carry how much.

score_n = (s_n - min s) / (max s - min s),  s = mean over branches and heads of softmax(A)
share(k) = sum of the k largest weights
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from heed.catalogue import provides
from heed.predict.mil.output import BagOutput

TOPS = (1, 2, 5, 10, 20, 50, 100)


@provides("09-acmil")
def instance_scores(
    output: BagOutput, valid: Bool[Tensor, "B N"] | None = None, *, per_branch: bool = False
) -> Float[Tensor, "B N"] | Float[Tensor, "B K N"]:
    """How much each instance is attended to, from 0 for the least of its bag to 1 for the most.

    Args:
        output: of a model.
        valid: False where an instance is padding, which scores 0.
        per_branch: one map per branch (B, K, N) instead of their mean (B, N).
    """
    scores = output.weights.mean(2)
    scores = scores if per_branch else scores.mean(1)
    if valid is None:
        valid = torch.ones(scores.shape[0], scores.shape[-1], dtype=torch.bool, device=scores.device)
    valid = valid[:, None] if per_branch else valid
    low = scores.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    high = scores.amax(-1, keepdim=True)
    tiny = torch.finfo(scores.dtype).tiny
    return ((scores - low) / (high - low).clamp_min(tiny)).masked_fill(~valid, 0)


@provides("09-acmil")
def cumulative_attention(weights: Float[Tensor, "*rows N"], tops: Sequence[int] = TOPS) -> Float[Tensor, "*rows t"]:
    """The share of attention that the strongest k instances carry, for each k.

    Args:
        weights: (..., N), summing to 1.
        tops: the k; beyond the number of instances the share is that of all.

    Raises:
        ValueError: a k below 1.
    """
    if min(tops) < 1:
        raise ValueError(f"tops={tuple(tops)}: count instances from 1")
    shares = weights.sort(-1, descending=True).values.cumsum(-1)
    return shares[..., [min(k, weights.shape[-1]) - 1 for k in tops]]


@provides("09-acmil")
def heatmap(
    scores: Float[Tensor, " N"], coordinates: Int64[Tensor, "N 2"], patch_size: int | None = None
) -> Float[Tensor, "H W"]:
    """Scores laid out where their patches lie; NaN where there is none, the mean where several fall on one place.

    Args:
        scores: (N,) of one bag.
        coordinates: (N, 2), x and y of the patches' corners in pixels.
        patch_size: pixels from one patch to the next; None for the smallest distance between two of them along an axis.

    Raises:
        ValueError: as many coordinates as scores are needed; a patch size below 1.
    """
    if coordinates.shape != (len(scores), 2):
        raise ValueError(
            f"coordinates {tuple(coordinates.shape)}: x and y of each of {len(scores)} instances are needed"
        )
    if patch_size is None:
        steps = torch.cat([axis.unique().diff() for axis in coordinates.unbind(1)])
        patch_size = int(steps.min()) if len(steps) else 1
    if patch_size < 1:
        raise ValueError(f"patch_size={patch_size} must be at least 1")
    x, y = ((coordinates - coordinates.amin(0)) // patch_size).unbind(1)
    height, width = int(y.max()) + 1, int(x.max()) + 1
    place = y * width + x
    total = scores.new_zeros(height * width).index_add_(0, place, scores)
    count = scores.new_zeros(height * width).index_add_(0, place, torch.ones_like(scores))
    return (total / count).view(height, width)  # 0 / 0 is NaN
