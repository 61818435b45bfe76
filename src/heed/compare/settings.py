"""The settings of a comparison: one immutable value that says everything a run depends on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from heed.errors import unknown

PRECISIONS = ("fp32", "bf16", "fp16")
AUGMENTATIONS = ("none", "shift", "flip")

# How a run is carried out; two runs that differ in these alone give the same accuracies and may share a folder.
EXECUTION = frozenset({"out", "jobs", "ray", "fresh"})


@dataclass(frozen=True)
class Settings:
    """What `heed compare classify` is asked to do.

    At most one of epochs, steps and minutes may be given; with none the budget follows the size of the data.

    Args:
        methods: names of attention layers (put into the host) or of models (taken whole).
        data: "digits", a folder of class folders, a folder of idx files, or what `datasets` can open.
        out: folder for everything the run writes.
        epochs: passes over the training images, per trial.
        steps: optimiser steps per trial.
        minutes: time for training all trials together; every trial gets the same share of it, and the steps that fit.
        seeds: trials per method, with seeds 0, 1, ...
        device: "auto", "cpu", "cuda", "cuda:1", "mps", ...
        precision: "fp32", "bf16" or "fp16" (mixed).
        jobs: processes that run trials; 1 runs them in this process.
        ray: address of a Ray cluster ("auto", "local", "ray://host:port"), None for no Ray; `out` must be a folder that
            all its machines see.
        strict: stop at the first file that cannot be read, instead of leaving it out with a warning.
        fresh: throw away an earlier run in `out`.
        host: the vision transformer that layers are put into.
        image_size: side in pixels that images are resized to; None for their own size, at most 64.
        augment: "shift" (random shifts by up to a fourteenth of the side), "flip" (that and mirroring) or "none".
        batch_size: images per step; fewer when there are fewer.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: of AdamW.
        threads: CPU threads per trial; None shares the cores out among the jobs. Accuracies repeat bit for bit on a CPU
            when this number is the same.
    """

    methods: tuple[str, ...]
    data: str = "digits"
    out: str = "runs/classify"
    epochs: int | None = None
    steps: int | None = None
    minutes: float | None = None
    seeds: int = 3
    device: str = "auto"
    precision: str = "fp32"
    jobs: int = 1
    ray: str | None = None
    strict: bool = False
    fresh: bool = False
    host: str = "vit_micro"
    image_size: int | None = None
    augment: str = "shift"
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    threads: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.methods, str):
            raise TypeError(f"methods={self.methods!r}: give a tuple of names")
        object.__setattr__(self, "methods", tuple(self.methods))
        if not self.methods:
            raise ValueError("methods is empty: name at least one, such as 'softmax'")
        twice = {name for name in self.methods if self.methods.count(name) > 1}
        if twice:
            raise ValueError(f"methods names {', '.join(sorted(twice))} more than once")
        for name in ("epochs", "steps", "seeds", "jobs", "image_size", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: give a whole number of at least 1")
        for name in ("minutes", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r}: give a number above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay={self.weight_decay!r}: give a number of at least 0")
        budgets = [name for name in ("epochs", "steps", "minutes") if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(f"{' and '.join(budgets)} are given together; choose one budget")
        if self.precision not in PRECISIONS:
            raise ValueError(unknown("precision", self.precision, PRECISIONS))
        if self.augment not in AUGMENTATIONS:
            raise ValueError(unknown("augmentation", self.augment, AUGMENTATIONS))
        if self.ray is not None and self.jobs > 1:
            raise ValueError(f"jobs={self.jobs} and ray={self.ray!r} are given together; choose one")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for results.json."""
        return {**dataclasses.asdict(self), "methods": list(self.methods)}

    def identity(self) -> dict[str, Any]:
        """The settings that results depend on."""
        return {key: value for key, value in self.to_json().items() if key not in EXECUTION}
