"""The settings of `heed compare slides`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heed.compare.settings import Settings


@dataclass(frozen=True)
class SlidesSettings(Settings):
    """What `heed compare slides` is asked to do, beside what `Settings` says.

    Args:
        methods: see `heed.compare.tracks.slides.methods`.
        data: "digits" for bags of digits (does the bag hold a nine?), or a folder with one file of features per slide.
        labels: csv file with the columns slide and label, perhaps patient and split; None for labels.csv in the folder.
        epochs: passes over the training bags; None for 20 on digits and the authors' 100 on slides.
        learning_rate: at the start of the cosine; None for 1e-3 on digits and the authors' 1e-4 on slides.
        weight_decay: of AdamW.
        batch_size: bags per step.
        dim: width that features are reduced to; None for the authors' choice for features of that width, or for half.
        n_token: attention branches of the methods that have several.
        n_masked_patch: how many of the strongest instances may be masked in training, in the methods that mask.
        mask_drop: share of them that is masked.
        split_seed: of the split by patients, where the table has none.
    """

    track: ClassVar[str] = "slides"

    data: str = "digits"
    out: str = "runs/slides"
    labels: str | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 1e-5
    batch_size: int = 1
    dim: int | None = None
    n_token: int = 5
    n_masked_patch: int = 10
    mask_drop: float = 0.6
    split_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("epochs", "batch_size", "dim", "n_token")
        self.check_positive("learning_rate")
        self.check_not_negative("weight_decay")
