"""VAR: finds tokens that soak up attention for nothing, and hands that attention to the image, in heads that look there.

In a row a of attention weights (K,) of a head and a query after the image, with visual sinks S_v and text sinks S_t
(`heed.multimodal.sinks`) and the image tokens I:

    selected  where  sum_{S_v} a / sum_I (a + 1e-6) <= rho  and  sum_I a >= summ
    budget    w    = (1 - p) (sum_{S_v} a + sum_{S_t} a)
    a'_j      = p a_j                                       j a sink
    a'_j      = a_j + w a_j / sum_{I without S_v} a         j an image token, no sink
    a'_j      = a_j                                         any other

so that the row keeps its sum. Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models"
(ICLR 2025), arXiv 2503.03321.

p is what sinks keep, as in the authors' code; in their paper it is the part that moves: give `moved_fraction` for that.
rho is the largest share of visual sinks, 1 minus the paper's smallest share of the others. With several images, or a
prompt in chunks, a query counts the image tokens it has before it: heed's reading, which for one image is the authors'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.hosts.rules import AttentionCall
from heed.multimodal.host import VisionHost, read_host
from heed.multimodal.prompt import Prompt
from heed.multimodal.registry import steering
from heed.multimodal.sinks import FIRST_LAYER, TAU, SinkRule, find_sink_dimensions, known_dimensions
from heed.multimodal.steering import Steering

RHO, KEPT, SUMM = 0.5, 0.6, 0.2


@provides("12-var")
def visual_sink_share(
    weights: Float[Tensor, "B H Q K"],
    sinks: Bool[Tensor, "B K"],
    image: Bool[Tensor, "B K"],
    seen: Int[Tensor, "B Q"] | None = None,
) -> Float[Tensor, "B H Q"]:
    """The part of each head's attention to the image that falls on sinks; 1 minus it is the paper's non-sink ratio.

    Args:
        weights: (B, H, Q, K) attention weights.
        sinks, image: (B, K) which keys are sinks, and image tokens.
        seen: (B, Q) image tokens before each query; None for all of them.
    """
    count = image.sum(1, keepdim=True) if seen is None else seen
    on_image = _sum(weights, image) + 1e-6 * count[:, None].to(weights.dtype)
    return _sum(weights, sinks & image) / on_image.clamp_min(torch.finfo(weights.dtype).tiny)


@provides("12-var")
def select_heads(
    weights: Float[Tensor, "B H Q K"],
    sinks: Bool[Tensor, "B K"],
    image: Bool[Tensor, "B K"],
    *,
    rho: float = RHO,
    summ: float = SUMM,
    seen: Int[Tensor, "B Q"] | None = None,
) -> Bool[Tensor, "B H Q"]:
    """Image-centric heads, per query: they look at the image, and not mostly at its sinks.

    Args:
        weights, sinks, image, seen: as in `visual_sink_share`.
        rho: largest share of visual sinks in the attention to the image.
        summ: smallest attention to the image.
    """
    return (visual_sink_share(weights, sinks, image, seen) <= rho) & (_sum(weights, image) >= summ)


@provides("12-var")
def redistribute(
    weights: Float[Tensor, "B H Q K"],
    sinks: Bool[Tensor, "B K"],
    image: Bool[Tensor, "B K"],
    selected: Bool[Tensor, "B H Q"],
    *,
    p: float = KEPT,
) -> Float[Tensor, "B H Q K"]:
    """Take 1 - p of the attention of all sinks and give it to the image's other tokens, in proportion to what they have.

    Args:
        weights, sinks, image: as in `visual_sink_share`.
        selected: (B, H, Q) the rows to change. Those with no attention on the image's other tokens stay as they are.
        p: what sinks keep.
    """
    others = image & ~sinks
    receiving = _sum(weights, others)
    selected = selected & (receiving > 0)
    gain = (1 - p) * _sum(weights, sinks) / receiving.masked_fill(~selected, 1)
    on_sinks, on_others = (mask[:, None, None].to(weights.dtype) for mask in (sinks, others))
    factor = 1 - (1 - p) * on_sinks + gain[..., None] * on_others
    return torch.where(selected[..., None], weights * factor, weights)


def _sum(weights: Float[Tensor, "B H Q K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B H Q"]:
    rows = weights.flatten(1, 2)  # one product per sample; broadcast over heads it would be many times slower
    return (rows @ mask[..., None].to(weights.dtype)).view(weights.shape[:-1])


@provides("12-var")
@dataclass(frozen=True, kw_only=True, eq=False)
class VAR(Steering):
    """Visual attention redistribution; apply it with `heed.apply(model, VAR())`.

    Works under `generate` with a cache, greedy, sampling or beams; sinks are found anew for every prompt. The handle's
    `state` is a `VARRule`.

    Args:
        sink_dimensions: hidden dimensions that give sinks away. None: the authors', for hosts built on Llama 2 7B or
            13B; for others `find_sink_dimensions` proposes some.
        tau: a token is a sink when phi exceeds it.
        rho: a head is image-centric when at most this share of its attention to the image is on sinks, in [0, 1].
        p: what a sink keeps of its attention, in [0, 1]; None for 0.6.
        moved_fraction: what a sink gives away, 1 - p: the paper's p. Give one of the two.
        summ: a head is image-centric when it gives the image at least this much attention, in [0, 1].
        first_layer: layers before it are left alone.
        skip_last_layer: leave the last layer alone, as the authors' configuration asks and their code does not.
        image_mask, strict: as in `Steering`.

    Raises:
        ValueError: a setting outside its range; when applied, sink dimensions the host does not have, a tau that no
            token can reach, or no sink dimensions known for the host.
    """

    # The largest share of visual sinks; from memory of the paper (0.8, 0.5 and 0.9 of the others), not verified.
    PRESETS: ClassVar[dict[str, float]] = {"vqa": 0.2, "hallucination": 0.5, "vision-centric": 0.1}

    sink_dimensions: tuple[int, ...] | None = None
    tau: float = TAU
    rho: float = RHO
    p: float | None = None
    moved_fraction: float | None = None
    summ: float = SUMM
    first_layer: int = FIRST_LAYER
    skip_last_layer: bool = False

    def __post_init__(self) -> None:
        for name in ("rho", "p", "moved_fraction", "summ"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must be in [0, 1]")
        if self.p is not None and self.moved_fraction is not None:
            raise ValueError(
                f"p={self.p} and moved_fraction={self.moved_fraction} are given together; give one of them"
            )
        if self.tau <= 0:
            raise ValueError(f"tau={self.tau!r} must be above 0")

    @classmethod
    def preset(cls, task: str, **settings: Any) -> Self:
        """VAR for a kind of task: "vqa", "hallucination" or "vision-centric"; they differ in rho only.

        Raises:
            ValueError: another kind of task, or a setting out of range.
        """
        if task not in cls.PRESETS:
            raise ValueError(unknown("preset", task, cls.PRESETS))
        return cls(rho=cls.PRESETS[task], **settings)

    @property
    def kept(self) -> float:
        """What sinks keep."""
        if self.moved_fraction is not None:
            return 1 - self.moved_fraction
        return KEPT if self.p is None else self.p

    def rule(self, host: VisionHost, prompt: Prompt) -> VARRule:
        dimensions = self.sink_dimensions
        if dimensions is None:
            dimensions = known_dimensions(host)
        if dimensions is None:
            raise ValueError(
                f"the sink dimensions of {type(host.model).__name__} with hidden size {host.hidden_size} are not known; "
                "give sink_dimensions (find_sink_dimensions proposes some from a few prompts)"
            )
        return VARRule(host, prompt, dimensions, self)


class VARRule(SinkRule):
    """What VAR keeps on a host.

    Attributes:
        sinks, visual: as in `SinkRule`.
        selected: by layer, (B, H, Q) the rows changed in the last forward; queries before the image are not among them.
    """

    def __init__(self, host: VisionHost, prompt: Prompt, dimensions: tuple[int, ...], var: VAR) -> None:
        super().__init__(host, prompt, dimensions, var.tau, var.first_layer)
        self.var = var
        self.selected: dict[int, Tensor] = {}
        self._last = len(host.layers) - 1 if var.skip_last_layer else None

    def weights(self, call: AttentionCall, weights: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B H Q K"]:
        """Change the rows of image-centric heads, after softmax."""
        prompt, layer, first = self.prompt, call.layer, self.prompt.first
        if not self.visual.get(layer) or layer == self._last or first == weights.shape[2]:
            return weights
        device = weights.device
        image, sinks = (prompt.keys(mask.to(device), weights.shape[3]) for mask in (prompt.image, self.sinks[layer]))
        seen, text = prompt.seen[:, first:].to(device), prompt.text[:, first:].to(device)
        rows = weights[:, :, first:]
        chosen = select_heads(rows, sinks, image, rho=self.var.rho, summ=self.var.summ, seen=seen)
        chosen = chosen & (text & self._met(layer).to(device)[:, first:])[:, None]
        self.selected[layer] = torch.nn.functional.pad(chosen, (first, 0))
        changed = redistribute(rows, sinks, image, chosen, p=self.var.kept)
        return changed if first == 0 else torch.cat([weights[:, :, :first], changed], 2)

    def _met(self, layer: int) -> Bool[Tensor, "B Q"]:
        """Which queries of this forward have a visual sink before them."""
        visual = self.sinks[layer] & self.prompt.image.to(self.sinks[layer].device)
        return visual.any(1, keepdim=True) if self.prompt.decoding else visual.cumsum(1)[:, self.prompt.past :] > 0


@steering.register("var")
def _var(host: nn.Module, prompts: Sequence[Mapping[str, Any]]) -> VAR:
    """VAR as set for hallucination, with the authors' sink dimensions or those that the prompts show."""
    if known_dimensions(read_host(host)) is not None:
        return VAR.preset("hallucination")
    found = find_sink_dimensions(host, prompts)
    if not found.dimensions:
        raise ValueError(
            f"{type(host).__name__} has no sinks that VAR could act on: no dimension reaches tau={found.tau:.3g} in "
            f"{len(prompts)} prompts; the strongest is {found.scores[0][0]}"
        )
    return VAR.preset("hallucination", sink_dimensions=found.dimensions, tau=found.tau)
