"""The settings of `heed compare pretrain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heed.compare.settings import PRECISIONS, Settings
from heed.compare.tracks.classify.settings import AUGMENTATIONS, ClassifySettings
from heed.errors import unknown

SCRATCH = "scratch"  # the method that is not pre-trained


@dataclass(frozen=True)
class PretrainSettings(Settings):
    """What `heed compare pretrain` is asked to do, beside what `Settings` says.

    Pre-training sees all training images and no label. At most one of epochs and steps may be given; with neither the
    budget follows the size of the data.

    Args:
        methods: names of registered objectives such as "mae-random" and "mae-green"; "scratch" is not pre-trained.
        data: "digits", a folder of class folders, a folder of idx files, or what `datasets` can open.
        epochs: passes over the training images in pre-training.
        steps: optimiser steps of pre-training.
        finetune_epochs: passes over the labelled images in fine-tuning.
        labels: labelled images per class for probe, neighbours and fine-tuning, always the same; None for all.
        neighbours: of the k-NN classifier.
        host: the vision transformer that is pre-trained; its attention must be dense.
        mask_ratio: share of masked patches.
        norm_pix: whether masked autoencoders predict pixels normalised per patch; off suits patches of a few pixels.
        image_size: side in pixels that images are resized to; None for their own size, at most 64.
        augment: "shift", "flip" or "none", in pre-training and fine-tuning.
        batch_size: images per step; fewer when there are fewer.
        learning_rate: peak of the one-cycle schedule of pre-training.
        finetune_learning_rate: that of fine-tuning.
        weight_decay: of AdamW.
        precision: "fp32", "bf16" or "fp16" (mixed).
        strict: stop at the first file that cannot be read, instead of leaving it out with a warning.
    """

    track: ClassVar[str] = "pretrain"

    data: str = "digits"
    out: str = "runs/pretrain"
    epochs: int | None = None
    steps: int | None = None
    finetune_epochs: int = 15
    labels: int | None = None
    neighbours: int = 10
    host: str = "vit_micro"
    mask_ratio: float = 0.75
    norm_pix: bool = False
    image_size: int | None = None
    augment: str = "shift"
    batch_size: int = 64
    learning_rate: float = 3e-3
    finetune_learning_rate: float = 1e-3
    weight_decay: float = 0.05
    precision: str = "fp32"
    strict: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("epochs", "steps", "finetune_epochs", "labels", "neighbours", "image_size", "batch_size")
        self.check_positive("learning_rate", "finetune_learning_rate")
        self.check_not_negative("weight_decay")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio={self.mask_ratio!r}: give a share between 0 and 1")
        self.check_one_budget("epochs", "steps")
        if self.precision not in PRECISIONS:
            raise ValueError(unknown("precision", self.precision, PRECISIONS))
        if self.augment not in AUGMENTATIONS:
            raise ValueError(unknown("augmentation", self.augment, AUGMENTATIONS))

    def recipe(self, learning_rate: float) -> ClassifySettings:
        """These settings as the track `classify` has them, for its `Learner`."""
        return ClassifySettings(
            self.methods,
            device=self.device,
            precision=self.precision,
            augment=self.augment,
            batch_size=self.batch_size,
            learning_rate=learning_rate,
            weight_decay=self.weight_decay,
        )
