"""The settings of `heed compare language`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heed.compare.settings import PRECISIONS, Settings
from heed.data.text import TOPICS
from heed.errors import unknown

POSITIONS = "positions.json"  # in a trial's folder: bits per byte at every place in the context


@dataclass(frozen=True)
class LanguageSettings(Settings):
    """What `heed compare language` is asked to do, beside what `Settings` says.

    At most one of epochs, steps and minutes may be given; with none, every trial has 600 steps.

    Args:
        methods: see `heed.compare.tracks.language.methods`.
        data: "topics" for the English that comes with Python, a text file, a folder of them, or what `datasets` opens.
        epochs: passes over the training text, per trial.
        steps: optimiser steps per trial.
        minutes: time for training all trials together; every trial gets the same share of it, and the steps that fit.
        width, layers, heads: of the decoder; models of their own have them too.
        context: bytes that a model sees at once.
        batch_size: stretches of text per step.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: of AdamW.
        precision: "fp32", "bf16" or "fp16" (mixed).
    """

    track: ClassVar[str] = "language"

    data: str = TOPICS
    out: str = "runs/language"
    epochs: int | None = None
    steps: int | None = None
    minutes: float | None = None
    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 256
    batch_size: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    precision: str = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("epochs", "steps", "width", "layers", "heads", "context", "batch_size")
        self.check_positive("minutes", "learning_rate")
        self.check_not_negative("weight_decay")
        self.check_one_budget("epochs", "steps", "minutes")
        if self.precision not in PRECISIONS:
            raise ValueError(unknown("precision", self.precision, PRECISIONS))
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(
                f"width={self.width} and heads={self.heads}: rotary embedding needs heads of an even, whole width"
            )
        if self.context % 32:
            raise ValueError(f"context={self.context}: give a multiple of 32, into which every method's blocks fit")
