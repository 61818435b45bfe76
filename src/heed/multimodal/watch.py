"""Seeing how a host attends while it works: where each written token looks, and how much of that falls on sinks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.hosts.rules import AttentionCall
from heed.methods import apply
from heed.multimodal.host import VisionHost
from heed.multimodal.prompt import ImageMask, Prompt
from heed.multimodal.sinks import FIRST_LAYER, TAU, SinkRule
from heed.multimodal.steering import Steering, SteeringRule
from heed.multimodal.var import visual_sink_share


@dataclass(frozen=True, kw_only=True, eq=False)
class WatchAttention(Steering):
    """Keeps the attention of the last query of every forward; changes nothing.

    Applied after other methods, it sees what they made of the attention. The handle's `state` is a `WatchRule`.
    """

    def rule(self, host: VisionHost, prompt: Prompt) -> WatchRule:
        return WatchRule(host, prompt)


class WatchRule(SteeringRule):
    """What was seen since the prompt began.

    Attributes:
        steps: one per forward, so one per written token: by layer, (B, H, K) the last query's attention.
    """

    def __init__(self, host: VisionHost, prompt: Prompt) -> None:
        super().__init__(host, prompt)
        self.steps: list[dict[int, Float[Tensor, "B H K"]]] = []

    def reset(self) -> None:
        self.steps = []

    def weights(self, call: AttentionCall, weights: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B H Q K"]:
        """Keep a copy."""
        if not self.steps or call.layer in self.steps[-1]:
            self.steps.append({})
        self.steps[-1][call.layer] = weights[:, :, -1].detach().clone()
        return weights

    def on_image(self, layers: Sequence[int] | None = None, row: int = 0) -> Float[Tensor, "S N"]:
        """Attention to each image token of a row, per forward: the mean over the heads of some layers.

        Args:
            layers: numbers of decoder layers; None for `middle_layers`.
            row: of the batch.
        """
        layers = middle_layers(len(self.host.layers)) if layers is None else layers
        places = self.prompt.image[row].nonzero()[:, 0]
        return torch.stack(
            [torch.stack([step[n][row].float().mean(0)[places.to(step[n].device)].cpu() for n in layers]).mean(0)
             for step in self.steps]
        )  # fmt: skip


def middle_layers(count: int) -> list[int]:
    """Three layers at a third of the depth, 10 to 12 of 32: where LLaVA-1.5-7B has most visual sinks, as its authors say."""
    first = max(round(count * 10 / 32), min(FIRST_LAYER, count - 1))
    return list(range(first, min(first + 3, count)))


@dataclass(frozen=True)
class LayerSinks:
    """The sinks of one layer, averaged over the rows and the text queries after the image.

    Args:
        layer: its number.
        visual, text: sinks at image tokens and elsewhere, per row.
        on_visual, on_text: the attention they get.
        on_others: the attention that the image's other tokens get.
        non_sink_ratio: per head, the part of the attention to the image that is not on visual sinks.
    """

    layer: int
    visual: float
    text: float
    on_visual: float
    on_text: float
    on_others: float
    non_sink_ratio: tuple[float, ...]


@provides("12-var")
@torch.no_grad()
def sink_statistics(
    host: nn.Module,
    prompt: Mapping[str, Any],
    sink_dimensions: Sequence[int],
    *,
    tau: float = TAU,
    first_layer: int = FIRST_LAYER,
    image_mask: ImageMask | None = None,
) -> list[LayerSinks]:
    """Where a host's sinks are, layer by layer, and what attention they get.

    Args:
        host: a vision-language model of transformers.
        prompt: what it is called with, as a processor returns it.
        sink_dimensions, tau, first_layer: as in `VAR`.
        image_mask: as in `Steering`.

    Returns:
        One entry for every layer from `first_layer` on; shares are nan where no query comes after an image.

    Raises:
        ValueError: sink dimensions or tau that do not fit the host.
    """
    method = _Statistics(dimensions=tuple(sink_dimensions), tau=tau, first_layer=first_layer, image_mask=image_mask)
    with apply(host, method) as handle:
        host(**prompt)
    return handle.state.found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Statistics(Steering):
    dimensions: tuple[int, ...]
    tau: float
    first_layer: int

    def rule(self, host: VisionHost, prompt: Prompt) -> _StatisticsRule:
        return _StatisticsRule(host, prompt, self.dimensions, self.tau, self.first_layer)


class _StatisticsRule(SinkRule):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.found: list[LayerSinks] = []

    def weights(self, call: AttentionCall, weights: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B H Q K"]:
        if call.layer not in self.sinks:
            return weights
        seen = self.prompt.image, self.sinks[call.layer]
        image, sinks = (self.prompt.keys(mask.to(weights.device), weights.shape[3]) for mask in seen)
        text = self.prompt.text.to(weights.device)
        rows = weights.float().transpose(1, 2)[text]  # (N, H, K)
        owner = text.nonzero()[:, 0]

        def on(mask: Tensor) -> float:
            return float((rows * mask[owner][:, None]).sum(-1).mean()) if len(rows) else math.nan

        share = visual_sink_share(weights.float(), sinks, image, self.prompt.seen.to(weights.device))
        kept = 1 - share.transpose(1, 2)[text]  # (N, H)
        ratios = kept.mean(0).tolist() if len(kept) else [math.nan] * weights.shape[1]
        self.found.append(
            LayerSinks(
                call.layer,
                float((sinks & image).sum(1).float().mean()),
                float((sinks & ~image).sum(1).float().mean()),
                on(sinks & image),
                on(sinks & ~image),
                on(image & ~sinks),
                tuple(ratios),
            )
        )
        return weights
