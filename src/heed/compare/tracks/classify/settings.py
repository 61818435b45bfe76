"""The settings of `heed compare classify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heed.compare.settings import PRECISIONS, Settings
from heed.errors import unknown

AUGMENTATIONS = ("none", "shift", "flip")


@dataclass(frozen=True)
class ClassifySettings(Settings):
    """What `heed compare classify` is asked to do, beside what `Settings` says.

    At most one of epochs, steps and minutes may be given; with none the budget follows the size of the data.

    Args:
        methods: names of attention layers (put into the host) or of models (taken whole).
        data: "digits", a folder of class folders, a folder of idx files, or what `datasets` can open.
        epochs: passes over the training images, per trial.
        steps: optimiser steps per trial.
        minutes: time for training all trials together; every trial gets the same share of it, and the steps that fit.
        precision: "fp32", "bf16" or "fp16" (mixed).
        strict: stop at the first file that cannot be read, instead of leaving it out with a warning.
        host: the vision transformer that layers are put into.
        image_size: side in pixels that images are resized to; None for their own size, at most 64.
        augment: "shift" (random shifts by up to a fourteenth of the side), "flip" (that and mirroring) or "none".
        batch_size: images per step; fewer when there are fewer.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: of AdamW.
    """

    track: ClassVar[str] = "classify"

    data: str = "digits"
    out: str = "runs/classify"
    epochs: int | None = None
    steps: int | None = None
    minutes: float | None = None
    precision: str = "fp32"
    strict: bool = False
    host: str = "vit_micro"
    image_size: int | None = None
    augment: str = "shift"
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("epochs", "steps", "image_size", "batch_size")
        self.check_positive("minutes", "learning_rate")
        self.check_not_negative("weight_decay")
        self.check_one_budget("epochs", "steps", "minutes")
        if self.precision not in PRECISIONS:
            raise ValueError(unknown("precision", self.precision, PRECISIONS))
        if self.augment not in AUGMENTATIONS:
            raise ValueError(unknown("augmentation", self.augment, AUGMENTATIONS))
