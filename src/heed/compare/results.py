"""What a comparison found: the schema of results.json, version 1.

    Results
      schema, track, settings
      machine   cpu, cores, threads, device, torch, heed, python
      data      name, classes, train, test, image
      methods   in order of rank, those that failed last; each with accuracy, costs and curves
      best      the trained model to take away

`Results.write` and `Results.read` are the only way in and out of the file.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from heed.checkpoint import write_atomically

SCHEMA = 1


@dataclass(frozen=True)
class Machine:
    """Where the figures were measured.

    Args:
        cpu: the processor's name.
        cores: logical cores this process may use.
        threads: threads each trial computed with.
        device: "cpu", or the accelerator's name.
        torch, heed, python: versions.
    """

    cpu: str
    cores: int
    threads: int
    device: str
    torch: str
    heed: str
    python: str


@dataclass(frozen=True)
class DataSummary:
    """What was learnt.

    Args:
        name: "digits", or the path or name that was given.
        classes: names of the classes, in the order of the labels.
        train, test: numbers of images.
        image: (channels, height, width) as the models see them.
        notes: what was done to the data that the user should know: files left out, images resized, a split made.
    """

    name: str
    classes: tuple[str, ...]
    train: int
    test: int
    image: tuple[int, int, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Accuracy:
    """Share of the test images a method gets right at the end of training, 0 to 1.

    Args:
        mean: over the seeds that finished; None when none did.
        spread: sample standard deviation over seeds; None with fewer than two.
        per_seed: in the order of the seeds; None where a trial failed.
    """

    mean: float | None
    spread: float | None
    per_seed: tuple[float | None, ...]


@dataclass(frozen=True)
class Curve:
    """How one trial went; the lists run in parallel.

    Args:
        seed: which trial.
        step: optimiser steps done.
        loss: mean training loss since the point before.
        accuracy: on the test images, 0 to 1. Nothing is chosen by it during training.
    """

    seed: int
    step: tuple[int, ...] = ()
    loss: tuple[float, ...] = ()
    accuracy: tuple[float, ...] = ()


@dataclass(frozen=True)
class MethodResult:
    """One row of the table.

    Args:
        method: the name given to `--methods`.
        status: "ok" when it was measured and every seed finished, else "failed".
        error: what went wrong, in one line; None when ok.
        rank: 1 + how many methods are better by more than the spread; None when failed.
        tied_with: methods whose difference from this one is smaller than the spread.
        accuracy: see `Accuracy`.
        steps: optimiser steps every trial of the method was given.
        parameters: trainable numbers.
        flops: per image and forward pass, counted as torch counts (2 x multiply-adds).
        train_images_per_second, infer_images_per_second: medians, at the batch size of the settings.
        peak_memory_bytes: most memory that tensors held during a training step; see `heed.compare.measure`.
        curves: one per seed that began.
    """

    method: str
    status: Literal["ok", "failed"]
    accuracy: Accuracy
    error: str | None = None
    rank: int | None = None
    tied_with: tuple[str, ...] = ()
    steps: int | None = None
    parameters: int | None = None
    flops: int | None = None
    train_images_per_second: float | None = None
    infer_images_per_second: float | None = None
    peak_memory_bytes: int | None = None
    curves: tuple[Curve, ...] = ()


@dataclass(frozen=True)
class Best:
    """The best seed of the first-ranked method.

    Args:
        method, seed: which trial.
        path: folder of the trained model, relative to the folder of results.json; for `heed.from_pretrained`.
    """

    method: str
    seed: int
    path: str


@dataclass(frozen=True)
class Results:
    """Everything `heed compare` found; see the module for the parts.

    Args:
        track: "classify".
        settings: the settings of the run, as JSON.
        machine, data: where and on what.
        methods: in order of rank, those that failed last.
        best: None when every method failed.
        schema: version of this layout.
    """

    track: str
    settings: dict[str, Any]
    machine: Machine
    data: DataSummary
    methods: tuple[MethodResult, ...] = ()
    best: Best | None = None
    schema: int = field(default=SCHEMA)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: another schema version, or a field is missing or unknown.
        """
        if values.get("schema") != SCHEMA:
            raise ValueError(f"results have schema {values.get('schema')!r}; this version of heed reads {SCHEMA}")
        best = values.get("best")
        try:
            return cls(
                track=values["track"],
                settings=values["settings"],
                machine=Machine(**values["machine"]),
                data=DataSummary(**_tuples(values["data"])),
                methods=tuple(_method(row) for row in values["methods"]),
                best=None if best is None else Best(**best),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"results do not follow schema {SCHEMA}: {error}") from error

    def write(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_atomically(Path(path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what `write` wrote.

        Raises:
            ValueError: not JSON, or not this schema.
        """
        try:
            values = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        return cls.from_json(values)


def _method(row: dict[str, Any]) -> MethodResult:
    values = _tuples(row)
    values["accuracy"] = Accuracy(**_tuples(row["accuracy"]))
    values["curves"] = tuple(Curve(**_tuples(curve)) for curve in row["curves"])
    return MethodResult(**values)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
