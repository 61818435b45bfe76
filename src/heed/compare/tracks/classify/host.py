"""The model a method is tried in: a layer goes into the host, a model is taken whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from heed.data.images import ImageData, patch_size
from heed.errors import unknown
from heed.layers.registry import layers
from heed.models import HeedModel, create_model, models
from heed.vision.backbone import Backbone


def check_methods(methods: Sequence[str], host: str) -> None:
    """Raise ValueError for a method that is no layer and no classifier, and for a host that takes no layer."""
    known = set(layers.names()) | set(models.names())
    for method in methods:
        if method not in known:
            raise ValueError(unknown("method", method, known))
        if method not in layers.names() and not classifies(method):
            raise ValueError(f"method {method!r} is no model that classifies images; it cannot be compared here")
    if "attention" not in _fields(host):
        raise ValueError(f"host={host!r} does not take an attention layer; 'vit_micro' does")


def classifies(model: str) -> bool:
    """Whether a registered model takes images and gives logits."""
    return issubclass(models.get(model).cls, Backbone)


def build_model(method: str, data: ImageData, host: str = "vit_micro") -> HeedModel:
    """A new model for some data.

    Args:
        method: name of a registered layer or model; layers win where both have the name.
        data: gives channels, size and number of classes.
        host: model that layers are put into, by its setting `attention`.

    Returns:
        (B, C, S, S) images to (B, classes) logits.
    """
    fitted = {
        "num_classes": len(data.classes),
        "in_chans": data.channels,
        "img_size": data.side,
    }
    if method in layers.names():
        return create_model(host, attention=method, patch_size=patch_size(data.side), **fitted)
    has = _fields(method)
    return create_model(method, **{name: value for name, value in fitted.items() if name in has})


def _fields(model: str) -> set[str]:
    return {field.name for field in dataclasses.fields(models.get(model).config)}
