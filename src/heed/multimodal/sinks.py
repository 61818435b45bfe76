"""Attention sinks in a vision-language model: how they are recognised, and which hidden dimensions give them away.

    phi(x_t) = max_{d in sink dimensions} |x_t[d]| / sqrt(mean_d x_t[d]^2 + 1e-6);   t is a sink where phi(x_t) > tau

x_t is the residual stream that enters a decoder layer. Kang et al., "See What You Are Told: Visual Attention Sink in
Large Multimodal Models" (ICLR 2025), arXiv 2503.03321. The authors name the sink dimensions of two language models;
`find_sink_dimensions` is heed's own way to propose them for any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.methods import apply
from heed.multimodal.host import VisionHost
from heed.multimodal.prompt import Prompt, fit
from heed.multimodal.steering import Steering, SteeringRule

FIRST_LAYER = 2  # sinks have not formed in the layers before
TAU = 20.0
_SHARE = TAU / math.sqrt(4096)  # of the largest phi there can be, for hidden sizes the authors did not have
# (hidden size, layers, key-value heads) of the Llamas whose sink dimensions the authors give: 7B and 13B of Llama 2.
_KNOWN = {(4096, 32, 32): (2533, 1415), (5120, 40, 40): (2100, 4743)}


@provides("12-var")
def sink_score(hidden: Float[Tensor, "*B T C"], dimensions: Sequence[int]) -> Float[Tensor, "*B T"]:
    """phi: how far the sink dimensions of each token stand out, float32; at most sqrt(C).

    Args:
        hidden: (..., T, C) hidden states entering a decoder layer, before its normalisation.
        dimensions: the sink dimensions.

    Raises:
        ValueError: no dimension, one outside the hidden size, or one given twice.
    """
    check_dimensions(dimensions, hidden.shape[-1])
    x = hidden.float()
    scale = (x.square().mean(-1) + 1e-6).sqrt()
    return x[..., list(dimensions)].abs().amax(-1) / scale


@provides("12-var")
def find_sinks(hidden: Float[Tensor, "*B T C"], dimensions: Sequence[int], tau: float = TAU) -> Bool[Tensor, "*B T"]:
    """Which tokens are sinks: phi > tau. Arguments as in `sink_score`."""
    return sink_score(hidden, dimensions) > tau


def check_dimensions(dimensions: Sequence[int], hidden_size: int) -> None:
    """ValueError for sink dimensions that a hidden size does not have, or that are named twice."""
    if not dimensions:
        raise ValueError("no sink dimension is given; find_sink_dimensions proposes some for a host")
    outside = [d for d in dimensions if not 0 <= d < hidden_size]
    if outside:
        raise ValueError(
            f"sink dimension {outside[0]} is outside the hidden size {hidden_size}: 0 to {hidden_size - 1}"
        )
    if len(set(dimensions)) < len(dimensions):
        raise ValueError(f"sink_dimensions={tuple(dimensions)} of hidden size {hidden_size} name one twice")


def known_dimensions(host: VisionHost) -> tuple[int, ...] | None:
    """The authors' sink dimensions for a host built on Llama 2 (LLaVA-1.5, LLaVA-1.6-vicuna); None for others."""
    config = host.language.config
    if config.model_type != "llama":
        return None
    return _KNOWN.get((config.hidden_size, config.num_hidden_layers, config.num_key_value_heads))


class SinkRule(SteeringRule):
    """Knows the sinks of the prompt under way.

    Sinks are looked for in prompts, never in decoding steps, so no generated token becomes one.

    Attributes:
        sinks: by layer, (B, T) True at the sinks among the positions of the prompt.
        visual: by layer, whether any row has a sink at an image token.
    """

    def __init__(
        self, host: VisionHost, prompt: Prompt, dimensions: Sequence[int], tau: float, first_layer: int = FIRST_LAYER
    ) -> None:
        super().__init__(host, prompt)
        check_dimensions(dimensions, host.hidden_size)
        if tau > math.sqrt(host.hidden_size):
            raise ValueError(
                f"tau={tau}: no token can ever be a sink, phi is at most {math.sqrt(host.hidden_size):.4g} with hidden "
                f"size {host.hidden_size}; {_SHARE * math.sqrt(host.hidden_size):.3g} is the like of 20 with 4096"
            )
        self.dimensions, self.tau, self.first_layer = tuple(dimensions), tau, first_layer
        self.sinks: dict[int, Tensor] = {}
        self.visual: dict[int, bool] = {}

    def reset(self) -> None:
        self.sinks, self.visual = {}, {}

    def entering(self, layer: int, hidden: Float[Tensor, "B Q C"]) -> None:
        """Look for the sinks of a layer among the tokens of this forward."""
        if layer < self.first_layer or self.prompt.decoding:
            return
        past, real, image = self.prompt.past, self.prompt.real, self.prompt.image
        new = find_sinks(hidden, self.dimensions, self.tau) & real[:, past:].to(hidden.device)
        old = fit(self.sinks.get(layer, new[:, :0]), past)  # what was generated in between is no sink
        self.sinks[layer] = torch.cat([old, new], 1)
        self.visual[layer] = bool((self.sinks[layer] & image.to(hidden.device)).any())


@dataclass(frozen=True)
class SinkDimensions:
    """What `find_sink_dimensions` proposes.

    Args:
        dimensions: those that stand out, the strongest first; empty where none reaches tau.
        tau: threshold for them.
        scores: by how much the strongest dimensions stand out, as (dimension, score), whether they reach tau or not.
    """

    dimensions: tuple[int, ...]
    tau: float
    scores: tuple[tuple[int, float], ...]


@provides("12-var")
@torch.no_grad()
def find_sink_dimensions(
    host: nn.Module,
    prompts: Sequence[Mapping[str, Any]],
    *,
    count: int = 2,
    tau: float | None = None,
    first_layer: int = FIRST_LAYER,
    image_mask: Any = None,
) -> SinkDimensions:
    """Propose the sink dimensions of a host from a few prompts; heed's own rule, the authors publish lists only.

    Sinks are few tokens on which a few dimensions hold a large part of the whole norm. A dimension's score is how far
    it stands out on its strongest token over its median token, max_t r_t[d] - median_t r_t[d] with r_t[d] = |x_t[d]| /
    rms(x_t), in the layer where that is most; `count` dimensions whose strongest r exceeds tau are proposed.

    Args:
        host: a vision-language model of transformers.
        prompts: what the host is called with, as a processor returns it: input_ids, pixel_values, ...
        count: how many dimensions to propose at most.
        tau: a token is a sink above it. None: 0.3125 sqrt(hidden size), which is the authors' 20 for hidden size 4096.
        first_layer: layers before it are not looked at.
        image_mask: as in `Steering`.

    Raises:
        ValueError: no prompt.
    """
    if not prompts:
        raise ValueError("no prompt is given; a few, as the processor returns them, are enough")
    with apply(host, _Look(first_layer=first_layer, image_mask=image_mask)) as handle:
        for prompt in prompts:
            host(**prompt)
    found: _LookRule = handle.state
    tau = _SHARE * math.sqrt(found.host.hidden_size) if tau is None else tau
    if found.score is None or found.peak is None:
        raise ValueError(f"first_layer={first_layer}: the host has only {len(found.host.layers)} decoder layers")
    order = found.score.argsort(descending=True).tolist()
    return SinkDimensions(
        tuple([d for d in order if found.peak[d] > tau][:count]),
        tau,
        tuple((d, float(found.score[d])) for d in order[: max(count, 5)]),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Look(Steering):
    """Sees the hidden states of prompts, and changes nothing."""

    first_layer: int = FIRST_LAYER

    def rule(self, host: VisionHost, prompt: Prompt) -> _LookRule:
        return _LookRule(host, prompt, self.first_layer)


class _LookRule(SteeringRule):
    def __init__(self, host: VisionHost, prompt: Prompt, first_layer: int) -> None:
        super().__init__(host, prompt)
        self.first_layer = first_layer
        self.score: Tensor | None = None  # (C,)
        self.peak: Tensor | None = None  # (C,)

    def entering(self, layer: int, hidden: Float[Tensor, "B Q C"]) -> None:
        if layer < self.first_layer:
            return
        x = hidden[self.prompt.real[:, self.prompt.past :].to(hidden.device)].float()
        ratio = x.abs() / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        peak = ratio.amax(0).cpu()
        score = peak - ratio.median(0).values.cpu()
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        self.score = score if self.score is None else torch.maximum(self.score, score)
