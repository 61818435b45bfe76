"""What every classifier of bags is: padded bags in, one prediction per bag and the attention it rests on out.

x (B, N, features), valid (B, N) -> logits (B, C), attention logits (B, K, H, N) of K branches with H heads
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from heed.models import HeedModel
from heed.predict.mil.losses import BagLosses, bag_losses
from heed.predict.mil.output import BagOutput


class BagModel(HeedModel):
    """Base of all classifiers of bags.

    A subclass has the settings `in_features` and `num_classes`, and defines `embed` and `classify`.
    """

    def forward(
        self,
        x: Float[Tensor, "B N C"] | Float[Tensor, "N C"],
        valid: Bool[Tensor, "B N"] | None = None,
        *,
        generator: torch.Generator | None = None,
        draws: Float[Tensor, "B K H k"] | None = None,
    ) -> BagOutput:
        """Classify bags.

        Args:
            x: (B, N, in_features) padded bags, or (N, in_features) for one bag. Padding may hold any finite numbers.
            valid: (B, N), False where an instance is padding; None for no padding.
            generator: what masking in training draws from; None for torch's own.
            draws: (B, K, H, min(top, N)) uniform numbers in place of its draws.

        Raises:
            ValueError: x or valid has another shape, or a bag is empty.
        """
        x = x[None] if x.ndim == 2 else x
        self._check(x, valid)
        return self.classify(self.embed(x), valid, generator, draws)

    def embed(self, x: Float[Tensor, "*bag N C"]) -> Float[Tensor, "*bag N D"]:
        """Embeddings of instances, which the attention is over; for UMAP and other maps of a bag."""
        raise NotImplementedError

    def classify(
        self, h: Float[Tensor, "B N D"], valid: Bool[Tensor, "B N"] | None, generator: Any, draws: Tensor | None
    ) -> BagOutput:
        """Attend to embedded instances and classify."""
        raise NotImplementedError

    def losses(self, output: BagOutput, labels: Int64[Tensor, " B"]) -> BagLosses:
        """What training minimises, as a sum and in its parts."""
        return bag_losses(output, labels)

    def _check(self, x: Tensor, valid: Tensor | None) -> None:
        width = self.config.in_features
        if x.ndim != 3 or x.shape[2] != width:
            raise ValueError(f"x {tuple(x.shape)}: this model takes bags (B, N, {width}) or one bag (N, {width})")
        if 0 in x.shape:
            raise ValueError(f"x {tuple(x.shape)}: empty bag; leave out bags without instances")
        if valid is None:
            return
        if valid.shape != x.shape[:2] or valid.dtype != torch.bool:
            raise ValueError(f"valid must be bool {tuple(x.shape[:2])}, not {valid.dtype} {tuple(valid.shape)}")
        if not torch.compiler.is_compiling() and not valid.any(1).all():
            empty = (~valid.any(1)).nonzero()[0].item()
            raise ValueError(f"valid: bag {empty} is an empty bag; leave out bags without instances")
