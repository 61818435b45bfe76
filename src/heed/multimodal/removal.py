"""The ablation behind VAR: hide the visual sinks from the text, or as many other image tokens, and see what changes.

    a'_j = 0 at the hidden image tokens, and a' / sum a' at the others,   for queries after the image

That visual sinks can go at little cost, and other image tokens cannot, is what the paper reads as their being of no use.
Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (ICLR 2025), arXiv 2503.03321; which
queries are meant, and that the others are drawn from the image tokens that are no sinks, are heed's reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heed.catalogue import provides
from heed.errors import unknown
from heed.hosts.rules import AttentionCall
from heed.multimodal.host import VisionHost
from heed.multimodal.prompt import Prompt
from heed.multimodal.sinks import FIRST_LAYER, TAU, SinkRule, known_dimensions
from heed.multimodal.steering import Steering


@provides("12-var")
@dataclass(frozen=True, kw_only=True, eq=False)
class RemoveVisualTokens(Steering):
    """Hides visual sinks, or as many random other image tokens, from the text that follows the image.

    Args:
        sink_dimensions, tau, first_layer: as in `VAR`.
        which: "sinks", or "random" for as many image tokens that are no sinks, drawn anew in every layer and row.
        renormalise: as if the scores were minus infinity: what is left sums to 1 again. False: weights set to zero.
        generator: makes the draw repeatable, on the CPU; None for torch's own.
        image_mask, strict: as in `Steering`.

    Raises:
        ValueError: another `which`; when applied, as in `VAR`.
    """

    sink_dimensions: tuple[int, ...] | None = None
    tau: float = TAU
    which: Literal["sinks", "random"] = "sinks"
    renormalise: bool = True
    first_layer: int = FIRST_LAYER
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.which not in ("sinks", "random"):
            raise ValueError(unknown("kind of image tokens", self.which, ("sinks", "random")))

    def rule(self, host: VisionHost, prompt: Prompt) -> RemovalRule:
        return RemovalRule(host, prompt, self)


class RemovalRule(SinkRule):
    """What the ablation keeps on a host.

    Attributes:
        sinks, visual: as in `SinkRule`.
        hidden: by layer, (B, T) the image tokens that the text does not see.
    """

    def __init__(self, host: VisionHost, prompt: Prompt, removal: RemoveVisualTokens) -> None:
        dimensions = removal.sink_dimensions or known_dimensions(host) or ()
        super().__init__(host, prompt, dimensions, removal.tau, removal.first_layer)
        self.removal = removal
        self.hidden: dict[int, Bool[Tensor, "B T"]] = {}

    def reset(self) -> None:
        super().reset()
        self.hidden = {}

    def entering(self, layer: int, hidden: Float[Tensor, "B Q C"]) -> None:
        super().entering(layer, hidden)
        if self.prompt.decoding or not self.visual.get(layer):
            return
        image = self.prompt.image.to(hidden.device)
        sinks = self.sinks[layer] & image
        self.hidden[layer] = sinks if self.removal.which == "sinks" else self._draw(sinks, image & ~sinks)

    def _draw(self, sinks: Bool[Tensor, "B T"], others: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """As many of the others as there are sinks, per row."""
        draw = torch.rand(others.shape, generator=self.removal.generator).to(others.device).masked_fill(~others, 2.0)
        place = draw.argsort(1).argsort(1)
        return (place < sinks.sum(1, keepdim=True)) & others

    def weights(self, call: AttentionCall, weights: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B H Q K"]:
        """Take the hidden tokens out of the rows after the image."""
        if call.layer not in self.hidden:
            return weights
        hidden = self.prompt.keys(self.hidden[call.layer].to(weights.device), weights.shape[3])
        text = self.prompt.text.to(weights.device)
        kept = weights.masked_fill(text[:, None, :, None] & hidden[:, None, None], 0)
        if not self.removal.renormalise:
            return kept
        total = kept.sum(-1, keepdim=True)
        return torch.where((total > 0) & text[:, None, :, None], kept / total.masked_fill(total == 0, 1), kept)
