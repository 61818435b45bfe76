"""A track: a task with data, a host, scores, and the methods that can run it. `heed.compare.running` carries it out.

A new track is one subclass of `Track`, one of `Settings`, one line in `TRACKS` and one command in `heed.cli`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from heed.compare.machine import describe_machine, device_kind
from heed.compare.progress import Progress, Report
from heed.compare.results import Cost, Curve, DataSummary, Machine, Metric, Results
from heed.compare.settings import Settings
from heed.errors import unknown

# Where the track of each name is defined, as its module's `TRACK`; imported when it is used.
TRACKS = {
    "cache": "heed.compare.tracks.cache.track",
    "classify": "heed.compare.tracks.classify.track",
    "hallucination": "heed.compare.tracks.hallucination.track",
    "language": "heed.compare.tracks.language.track",
    "pretrain": "heed.compare.tracks.pretrain.track",
    "slides": "heed.compare.tracks.slides.track",
}


@dataclass
class Trial:
    """A trial under way: what is to be done, and where it notes how it goes.

    Args:
        settings, method, seed: which trial.
        steps: its budget, as the track measured it out; 0 where the track has no steps.
        folder: where it keeps its files; a trained model goes into `folder / "model"`.
        device: where it computes.
        report: told of the progress.
        curve: its course so far; a track that goes on where it was puts back what it had.
        costs: what it cost, by the names of the track's costs; where a track measures them within its trials.
    """

    settings: Any
    method: str
    seed: int
    steps: int
    folder: Path
    device: str
    report: Report
    curve: Curve = field(init=False)
    costs: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.curve = Curve(self.seed)

    def tell(self, step: int, loss: float | None = None, score: str | None = None) -> None:
        """Report progress; `score` is in words, such as "accuracy 97.8 %"."""
        self.report(Progress(self.method, self.seed, "training", step, self.steps, loss, score))


@dataclass(frozen=True)
class Measured:
    """What is known of a method before its trials.

    Args:
        machine: where it was measured.
        costs: by the names of the track's costs; None where a device does not report it.
        steps: the budget of each of its trials; 0 where the track has no steps.
    """

    machine: Machine
    costs: dict[str, float | None] = field(default_factory=dict)
    steps: int = 0


class Track(ABC):
    """A task that methods are compared on.

    Class attributes:
        name: of the command, `heed compare NAME`.
        metrics: the scores of a trial; methods are ranked by the first.
        costs: what a method costs.
        charted: names of the scores that the report draws against costs; none for the first alone.
        template: of the report, beside this file; it may extend "report.html.j2".
        explained: one sentence about the first metric, for the report.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    costs: ClassVar[tuple[Cost, ...]] = ()
    charted: ClassVar[tuple[str, ...]] = ()
    template: ClassVar[str] = "report.html.j2"
    explained: ClassVar[str] = ""

    @abstractmethod
    def check(self, settings: Any) -> None:
        """Raise ValueError for methods or settings that cannot work, before anything is written."""

    @abstractmethod
    def load(self, settings: Any) -> Any:
        """Read the data that the settings name."""

    @abstractmethod
    def fingerprint(self, data: Any) -> str:
        """A digest of the data, by which a run knows its own data again."""

    @abstractmethod
    def save(self, data: Any, out: Path) -> list[str]:
        """Write the data where every trial reads it; returns the names of the files in `out`."""

    @abstractmethod
    def read(self, settings: Any) -> Any:
        """Read what `save` wrote."""

    @abstractmethod
    def describe(self, data: Any) -> DataSummary:
        """The data in words, for results and report."""

    def measure(self, settings: Any, method: str, data: Any, threads: int, parallel: int) -> Measured:
        """What a method costs and its budget, measured with nothing else going on.

        Args:
            settings, method, data: which.
            threads: CPU threads.
            parallel: how many trials will run at once.
        """
        del method, data, parallel
        return Measured(describe_machine(torch.device(device_kind(settings.device)), threads))

    @abstractmethod
    def trial(self, trial: Trial, data: Any) -> dict[str, float]:
        """Do a trial, or go on with it; returns its scores by the names of `metrics`."""

    def pictures(self, results: Results, folder: Path) -> dict[str, Any]:
        """What the track's template shows beside the tables and charts that every track has."""
        del results, folder
        return {}


def track(name: str) -> Track:
    """The track of a name."""
    if name not in TRACKS:
        raise ValueError(unknown("track", name, TRACKS))
    return importlib.import_module(TRACKS[name]).TRACK


def track_of(settings: Settings) -> Track:
    """The track that settings belong to."""
    return track(settings.track)
