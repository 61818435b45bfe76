"""What a classifier of bags says, and the attention it rests on."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides


@provides("09-acmil")
class BagOutput(NamedTuple):
    """What a model says about bags.

    Args:
        logits: (B, C) of the bags.
        attention: (B, K, H, N) logits of K branches with H heads; instances masked in training have -1e9, and padding
            the lowest finite value. Take `weights` for anything to look at.
        features: (B, D) of the bags, which the logits are read from.
        branch_logits: (B, K, C), what each branch says; None where a model has no branch classifiers.
    """

    logits: Float[Tensor, "B C"]
    attention: Float[Tensor, "B K H N"]
    features: Float[Tensor, "B D"]
    branch_logits: Float[Tensor, "B K C"] | None = None

    @property
    def weights(self) -> Float[Tensor, "B K H N"]:
        """softmax(attention) over the instances; padding has exactly 0."""
        return self.attention.softmax(-1)
