"""One trial: a method, a seed, a number of steps. It can be killed at any moment and taken up again.

OUT/trials/METHOD-SEED/
  model/             the trained model, where the track trains one
  result.json        written last; with it, the trial is done
  error.txt          the traceback, when it failed
  checkpoint-*/      what the track keeps to go on from; removed when the trial is done
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch

from heed.checkpoint import write_atomically
from heed.compare.machine import is_leader, meet, repeatable
from heed.compare.progress import Progress, Report
from heed.compare.results import Curve
from heed.compare.settings import Settings
from heed.compare.table import score_in_words
from heed.compare.track import Track, Trial, track_of


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended.

    Args:
        method, seed, steps: which trial.
        status: "ok" or "failed".
        curve: what was noted on the way.
        scores: at the end, by the names of the track's metrics; empty when failed.
        costs: where the track measures them within its trials.
        error: what went wrong in one line; None when ok.
    """

    method: str
    seed: int
    steps: int
    status: Literal["ok", "failed"]
    curve: Curve
    scores: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def write(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_atomically(path, json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        values = json.loads(path.read_text())
        return cls(**{**values, "curve": Curve.from_json(values["curve"])})


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why."""


def trial_folder(out: Path, method: str, seed: int) -> Path:
    """Where a trial keeps its files."""
    return out / "trials" / f"{method}-{seed}"


def run_trial(
    settings: Settings,
    method: str,
    seed: int,
    steps: int,
    data: Any,
    *,
    threads: int,
    report: Report,
    device: str | None = None,
) -> TrialResult:
    """Do a trial, or go on with it, and write the result; an exception becomes a failed result.

    Args:
        settings: of the track.
        method, seed: which trial.
        steps: its budget, as the track measured it out.
        data: as the track reads it.
        threads: CPU threads; scores repeat bit for bit on the CPU when this is the same.
        report: told of the progress.
        device: overrides the settings' device.
    """
    track = track_of(settings)
    folder = trial_folder(Path(settings.out), method, seed)
    folder.mkdir(parents=True, exist_ok=True)
    trial = Trial(settings, method, seed, steps, folder, device or settings.device, report)
    try:
        with repeatable(threads, trial.device):
            scores = track.trial(trial, data)
        result = TrialResult(method, seed, steps, "ok", trial.curve, scores, trial.costs)
    except Exception as error:
        # The comparison goes on whatever one method does; the row and error.txt say what it was.
        write_atomically(folder / "error.txt", traceback.format_exc())
        result = TrialResult(method, seed, steps, "failed", trial.curve, error=describe_error(error))
        _release_memory()
    if is_leader():
        result.write(folder / "result.json")
        for checkpoint in folder.glob("checkpoint-*") if result.status == "ok" else ():
            shutil.rmtree(checkpoint)
    meet()
    report(ended(track, result))
    return result


def ended(track: Track, result: TrialResult) -> Progress:
    """The news that a trial has ended."""
    if result.status == "failed":
        return Progress(result.method, result.seed, "failed", error=result.error)
    words = score_in_words(track.metrics[0], result.scores[track.metrics[0].name])
    return Progress(result.method, result.seed, "trained", result.steps, result.steps, None, words)


def describe_error(error: BaseException) -> str:
    """One line for the table."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    if out_of_memory:
        return f"out of memory: {first}"
    return first if isinstance(error, TrainingFailed) else f"{type(error).__name__}: {first}"


def _release_memory() -> None:
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
