"""The encoder that is pre-trained, and the objectives around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from heed.compare.tracks.pretrain.settings import SCRATCH, PretrainSettings
from heed.data.images import ImageData, patch_size
from heed.errors import unknown
from heed.models import create_model, models
from heed.pretrain.encoders import encoder_for, initialise
from heed.pretrain.objective import Objective, objectives
from heed.vision.vit import ViT


def check_methods(methods: Sequence[str], host: str) -> None:
    """Raise ValueError for a method that is no objective, and for a host that cannot be pre-trained."""
    known = {SCRATCH, *objectives.names()}
    for method in methods:
        if method not in known:
            raise ValueError(unknown("method", method, known))
    entry = models.get(host)
    if not issubclass(entry.cls, ViT) or entry.config.attention != "softmax":
        raise ValueError(f"host={host!r} is no vision transformer with dense attention; 'vit_micro' is")


def build_host(settings: PretrainSettings, data: ImageData) -> ViT:
    """A new host with fixed sinusoidal positions: the same start for every method, "scratch" included."""
    model = cast(
        ViT,
        create_model(
            settings.host,
            num_classes=len(data.classes),
            in_chans=data.channels,
            img_size=data.side,
            patch_size=patch_size(data.side),
        ),
    )
    initialise(model)
    encoder_for(model).fix_positions()
    return model


def build_objective(settings: PretrainSettings, method: str, model: ViT) -> Objective | None:
    """The objective of a method around a model; None for "scratch".

    Raises:
        ValueError: the objective does not fit the images, e.g. a mask that needs another grid.
    """
    if method == SCRATCH:
        return None
    return objectives.get(method)(model, ratio=settings.mask_ratio, norm_pix=settings.norm_pix)
