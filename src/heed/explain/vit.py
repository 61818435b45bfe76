"""A vision transformer as heed's analyses see it, whichever library it comes from.

Tokens are [prefix tokens, gh * gw patches in rows]; the first prefix token, if there is one, is the class token. Known
are heed's backbones on one grid of tokens, timm's VisionTransformer (with its class, distillation and register tokens)
and transformers' image models that attend through its attention interface (ViT, DeiT, CLIP's and SigLIP's vision
towers, Dinov2, with and without a classifier).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from heed.explain.attention import evaluating
from heed.hosts.attach import attach_rule, attention_layers, is_transformers
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.methods import Handle, Method, apply
from heed.vision.backbone import Backbone

KNOWN = (
    "heed's backbones on one grid of tokens, timm's VisionTransformer, and transformers' ViT, DeiT, CLIP and SigLIP "
    "vision models and Dinov2"
)

Classifier = Callable[[Float[Tensor, "B F"]], Float[Tensor, "B C"]]


@dataclass(frozen=True)
class Prediction:
    """What a model says of a batch: feature (B, F), the input of its classifier, and logits (B, C) or None."""

    feature: Float[Tensor, "B F"]
    logits: Float[Tensor, "B C"] | None

    @cached_property
    def probabilities(self) -> Float[Tensor, "B C"]:
        if self.logits is None:
            raise ValueError("the model has no classifier; pass classifier=, a function from features to logits")
        return self.logits.float().softmax(-1)


class Vit:
    """A model with what an analysis needs to know of it.

    Args:
        model: see the module. Its weights, mode and hooks are left as they are.
        images: (B, C, H, W), at least one; the model is run once on the first of them to see its attention.
        grid: rows and columns of patches; None reads them from the model and the size of the images.
        classifier: for a model without one: (B, F) features to (B, C) logits, such as CLIP's zero-shot classifier.

    Attributes:
        layers, heads, grid, prefix: attention layers, heads in each, rows and columns of patches, tokens before them.
        predicts: whether there are logits.

    Raises:
        TypeError: the model's attention cannot be reached, or is not that of a ViT (windows, stages).
        ValueError: the grid does not fit the tokens, is needed, or the layers differ in their number of heads.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Float[Tensor, "B C H W"],
        grid: tuple[int, int] | None = None,
        classifier: Classifier | None = None,
    ) -> None:
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"images must be (B, C, H, W) with at least one image, not {tuple(images.shape)}")
        self.model = model
        self.classifier = classifier
        self._predict = _how_to_predict(model)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with evaluating(model), torch.no_grad(), apply(model, _Look()) as handle:
            self.predicts = self.predict(images[:1]).logits is not None
        seen: dict[int, tuple[int, ...]] = handle.state
        counts = {shape[2] for shape in seen.values()}
        tokens = {shape[1] for shape in seen.values()}
        if any(shape[0] != 1 for shape in seen.values()) or len(tokens) > 1:
            raise TypeError(
                f"{type(model).__name__} attends inside windows or in stages of several sizes "
                f"({sorted(tokens)} tokens); heads are analysed in models whose layers all see the same tokens: {KNOWN}"
            )
        if len(counts) > 1:
            raise ValueError(f"the layers of {type(model).__name__} have {sorted(counts)} heads; one number is needed")
        self.numbers = sorted(seen)  # what the host calls the layers that took part
        self.layers, self.heads, self.tokens = len(seen), counts.pop(), tokens.pop()
        self.grid = _grid(model, images, grid, self.tokens)
        self.prefix = self.tokens - math.prod(self.grid)

    def predict(self, images: Float[Tensor, "B C H W"]) -> Prediction:
        """Feature and logits of a batch, with whatever is applied to the model at the time."""
        feature, logits = self._predict(images.to(self.device))
        return Prediction(feature, self.classifier(feature) if self.classifier is not None else logits)


def check_grid(grid: tuple[int, int] | None, tokens: int, prefix: int | None = None) -> tuple[int, int]:
    """Rows and columns of the patches among `tokens` tokens; None for a square with 0 or 1 token before it.

    Args:
        grid: as given by the caller.
        tokens: of the model, prefix tokens included.
        prefix: tokens before the patches, where known.

    Raises:
        ValueError: there is no such square, or the grid does not fit.
    """
    if grid is None:
        for before in (0, 1) if prefix is None else (prefix,):
            side = math.isqrt(max(tokens - before, 0))
            if side and side * side == tokens - before:
                return side, side
        raise ValueError(f"{tokens} tokens are no square of patches; pass grid=(h, w)")
    patches = math.prod(grid)
    if min(grid) < 1 or patches > tokens or (prefix is not None and patches + prefix != tokens):
        before = "" if prefix is None else f" and {prefix} before them"
        raise ValueError(f"grid={tuple(grid)} does not fit {tokens} tokens{before}; pass grid=(h, w)")
    return grid[0], grid[1]


def count_heads(layer: nn.Module) -> int:
    """Query heads of an attention layer of a host."""
    config = getattr(layer, "config", None)
    for owner, name in ((layer, "num_heads"), (layer, "num_attention_heads"), (config, "num_attention_heads")):
        found = getattr(owner, name, None)
        if isinstance(found, int):
            return found
    raise TypeError(f"{type(layer).__name__} does not say how many heads it has; known are {KNOWN}")


class _Look(Method):
    """Notes the shape (B, tokens, heads, D) of the heads' outputs per layer."""

    def attach(self, host: nn.Module, handle: Handle) -> dict[int, tuple[int, ...]]:
        rule = _LookRule()
        attach_rule(host, rule, handle)
        return rule.seen


class _LookRule(AttentionRule):
    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, ...]] = {}

    def after(self, call: AttentionCall, out: Tensor) -> Tensor:
        self.seen[call.layer] = tuple(out.shape)
        return out


def _how_to_predict(model: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """The function from images to feature and logits for the library of a model; TypeError for an unknown one."""
    if _windowed(model):
        raise TypeError(
            f"{type(model).__name__} attends inside windows, where rings and grids of the whole image mean nothing; "
            f"heads are analysed in {KNOWN}"
        )
    attention_layers(model)  # TypeError where there are none
    if isinstance(model, Backbone | VisionTransformer):
        return lambda images: _predict_timm(model, images)
    if is_transformers(model) and getattr(model, "main_input_name", "") == "pixel_values":
        return lambda images: _predict_transformers(model, images)
    raise TypeError(f"heads of {type(model).__name__} cannot be analysed; known are {KNOWN}")


def _windowed(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    if is_transformers(model) and getattr(config, "window_size", None):
        return True
    return any(type(part).__name__ == "WindowAttention" for part in model.modules())


def _predict_timm(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    features = model.forward_features(images)
    logits = model.forward_head(features) if model.num_classes else None
    return model.forward_head(features, pre_logits=True), logits


def _predict_transformers(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    side = getattr(model.config, "image_size", None)
    other_size = side is not None and tuple(images.shape[2:]) != _pair(side)
    options = {}
    if other_size and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        options["interpolate_pos_encoding"] = True
    classifier = next((name for name in ("classifier", "cls_classifier") if getattr(model, name, None) is not None), "")
    if not classifier:
        out = model(pixel_values=images, **options)
        # Towers of CLIP's kind normalise the class token only where they pool it.
        pooled = any(name.endswith("post_layernorm") for name, _ in model.named_modules())
        return (out.pooler_output if pooled else out.last_hidden_state[:, 0]), None
    found: list[Tensor] = []
    hook = getattr(model, classifier).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        logits = model(pixel_values=images, **options).logits
    finally:
        hook.remove()
    return found[0], logits


def _grid(model: Any, images: Tensor, grid: tuple[int, int] | None, tokens: int) -> tuple[int, int]:
    size = images.shape[2], images.shape[3]
    prefix = None
    if isinstance(model, VisionTransformer):
        prefix = model.num_prefix_tokens
        if grid is None:
            grid = tuple(model.patch_embed.dynamic_feat_size(size))
    elif grid is None and isinstance(model, Backbone):
        stride = model.feature_info[0]["reduction"]
        grid = size[0] // stride, size[1] // stride
    elif grid is None and getattr(model.config, "patch_size", None):
        patch = _pair(model.config.patch_size)
        grid = size[0] // patch[0], size[1] // patch[1]
    return check_grid(grid, tokens, prefix)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
