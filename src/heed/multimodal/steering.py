"""What methods that steer a host's attention share: they follow the prompt, see hidden states and attention weights.

A method is a `Steering`; what it does is its `SteeringRule`, one per host, which is also the handle's `state`:

    entering(layer, x)           x (B, Q, C) enters a decoder layer, before its normalisation
    before, core, weights, after as `AttentionRule` has them, for the language part's attention
    prompt                       where the image is, which queries come after it, whether this is a decoding step
    reset()                      a new prompt begins
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionRule
from heed.methods import Handle, Method
from heed.multimodal.host import VisionHost, read_host
from heed.multimodal.prompt import ImageMask, Prompt


class SteeringRule(AttentionRule):
    """What a steering method does on one host, and what it keeps there.

    Args:
        host: the parts of the host.
        prompt: kept up to date; see `Prompt`.
    """

    def __init__(self, host: VisionHost, prompt: Prompt) -> None:
        self.host = host
        self.prompt = prompt

    def reset(self) -> None:
        """A new prompt begins."""

    def entering(self, layer: int, hidden: Float[Tensor, "B Q C"]) -> None:
        """Hidden states enter a decoder layer, counted from 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Steering(Method):
    """Base of the methods that steer how a vision-language model attends.

    Args:
        image_mask: where the image tokens are, for hosts whose configuration does not say it: (B, T) bool for the one
            prompt that follows, or a function of token ids (B, N) that gives (B, N) bool. None: from the host's ids.
        strict: raise ValueError for a prompt without an image token; otherwise such a row is left alone.
    """

    image_mask: ImageMask | None = None
    strict: bool = False

    @abstractmethod
    def rule(self, host: VisionHost, prompt: Prompt) -> SteeringRule:
        """What the method does on a host.

        Raises:
            ValueError: a setting does not fit the host.
        """

    def attach(self, host: nn.Module, handle: Handle) -> SteeringRule:
        """Follow the host's prompts and attach the rule; the handle's `state` is the rule."""
        parts = read_host(host)
        prompt = Prompt(parts, self.image_mask, self.strict)
        rule = self.rule(parts, prompt)
        prompt.on_new(rule.reset)
        attach_rule(parts.language, rule, handle)
        prompt.follow(handle)
        if type(rule).entering is not SteeringRule.entering:
            for number, layer in enumerate(parts.layers):
                handle.hook(layer.register_forward_pre_hook(_entering(rule, number), with_kwargs=True))
        return rule


def _entering(rule: SteeringRule, layer: int) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rule.entering(layer, args[0] if args else kwargs["hidden_states"])

    return hook
