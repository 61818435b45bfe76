"""The methods of `slides`: each is a model of heed with its settings; a new one is one line in `METHODS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from heed.compare.tracks.slides.settings import SlidesSettings
from heed.data.bags import BagData
from heed.errors import unknown
from heed.models import create_model, models
from heed.predict.acmil import ENCODERS
from heed.predict.mil.model import BagModel
from heed.predict.mil.training import BagRecipe


@dataclass(frozen=True)
class SlideMethod:
    """A model by name, and what is fixed about it; other settings of the track that the model has are passed on."""

    model: str
    fixed: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "abmil": SlideMethod("abmil"),
    "stkim": SlideMethod("acmil_ga", {"n_token": 1}),
    "acmil-ga": SlideMethod("acmil_ga"),
    "acmil-mha": SlideMethod("acmil_mha"),
}


def check_methods(methods: Sequence[str]) -> None:
    """Raise ValueError for a method that there is not."""
    for method in methods:
        if method not in METHODS:
            raise ValueError(unknown("method", method, METHODS))


def build_model(method: str, settings: SlidesSettings, data: BagData) -> BagModel:
    """A new model of a method for some data."""
    chosen = METHODS[method]
    fitted = {
        "in_features": data.width,
        "num_classes": len(data.classes),
        "dim": settings.dim or reduced_width(data.width),
        "n_token": settings.n_token,
        "n_masked_patch": settings.n_masked_patch,
        "mask_drop": settings.mask_drop,
        **chosen.fixed,
    }
    has = {item.name for item in dataclasses.fields(models.get(chosen.model).config)}
    return cast(BagModel, create_model(chosen.model, **{name: value for name, value in fitted.items() if name in has}))


def reduced_width(width: int) -> int:
    """The authors' width for an encoder whose features are so wide; else half, in eights, and at least 64."""
    known = {encoder["in_features"]: encoder["dim"] for encoder in ENCODERS.values()}
    return known.get(width, max(64, width // 2 // 8 * 8))


def recipe(settings: SlidesSettings, data: BagData) -> BagRecipe:
    """How every method is trained."""
    small = data.name == "digits"
    return BagRecipe(
        epochs=settings.epochs or (20 if small else 100),
        learning_rate=settings.learning_rate or (1e-3 if small else 1e-4),
        weight_decay=settings.weight_decay,
        batch_size=settings.batch_size,
    )
