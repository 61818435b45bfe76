"""Losses of a bag with several attention branches (card 09).

L = mean_i CE(branch_i, y) + CE(slide, y) + diversity
diversity = 2 / (K (K - 1)) sum_{i<j} cos(a_i, a_j),  a (B, K, H, N) the attention weights, mean over bags and heads
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from heed.catalogue import provides
from heed.predict.mil.output import BagOutput


@provides("09-acmil")
class BagLosses(NamedTuple):
    """The loss and its parts, means over bags; the parts that need branches are 0 without them."""

    total: Float[Tensor, ""]
    branch: Float[Tensor, ""]
    slide: Float[Tensor, ""]
    diversity: Float[Tensor, ""]


@provides("09-acmil")
def attention_diversity(weights: Float[Tensor, "B K H N"]) -> Float[Tensor, ""]:
    """Mean pairwise cosine of the branches' attention: 1 when all look at the same instances, 0 when at different ones.

    Args:
        weights: (B, K, H, N), not negative, such as `BagOutput.weights`; with one branch the result is 0.
    """
    branches = weights.shape[1]
    if branches == 1:
        return weights.new_zeros(())
    unit = F.normalize(weights, dim=-1, eps=1e-8)
    cosines = torch.einsum("bihn,bjhn->ijbh", unit, unit).mean((2, 3))
    return cosines.triu(1).sum() * 2 / (branches * (branches - 1))


@provides("09-acmil")
def bag_losses(output: BagOutput, labels: Int64[Tensor, " B"]) -> BagLosses:
    """Cross-entropy of bags and branches, and the diversity of attention, in equal parts.

    Args:
        output: of a model.
        labels: (B,) classes of the bags.

    Raises:
        ValueError: a label is no class.
    """
    classes = output.logits.shape[1]
    if labels.shape != output.logits.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)}: one is needed for each of {len(output.logits)} bags")
    if not torch.compiler.is_compiling() and not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(f"labels {labels.tolist()}: classes run from 0 to {classes - 1}")
    slide = F.cross_entropy(output.logits, labels)
    branch = diversity = slide.new_zeros(())
    if output.branch_logits is not None and output.attention.shape[1] > 1:
        count = output.branch_logits.shape[1]
        branch = F.cross_entropy(output.branch_logits.flatten(0, 1), labels.repeat_interleave(count))
        diversity = attention_diversity(output.weights)
    return BagLosses(branch + slide + diversity, branch, slide, diversity)
