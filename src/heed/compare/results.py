"""What a comparison found: the schema of results.json, version 2.

    Results
      schema, track, settings
      machine   cpu, cores, threads, device, torch, heed, python
      data      name, train, test, unit, details
      metrics   the scores that were taken; methods are ranked by the first
      costs     what was measured besides
      methods   in order of rank, those that failed last; each with scores, costs and curves
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

SCHEMA = 2


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
    """What was learnt, or tested on.

    Args:
        name: "digits", or the path or name that was given.
        train, test: how many there are of each.
        unit: of what: "images", "questions", "bags".
        details: what a track says beside that, such as the names of the classes; plain JSON values.
        notes: what was done to the data that the user should know: files left out, images resized, a split made.
    """

    name: str
    train: int
    test: int
    unit: str
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """A score of a trial.

    Args:
        name: key of the scores.
        title: as a table says it.
        better: whether "higher" or "lower" is better.
        form: "percent" for a share of the test examples, 0 to 1; "number" for anything else.
        margin: of scores that are no shares: with one seed, methods tie when they differ by no more than this share.
    """

    name: str
    title: str
    better: Literal["higher", "lower"] = "higher"
    form: Literal["percent", "number"] = "percent"
    margin: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What a method costs.

    Args:
        name: key of the costs.
        short: as the terminal's table says it.
        title: as the report says it; the same when empty.
        unit: written behind the number and its prefix, such as "B".
        plot: what the report's chart of score against this cost is called; empty for no chart.
    """

    name: str
    short: str
    title: str = ""
    unit: str = ""
    plot: str = ""


@dataclass(frozen=True)
class Score:
    """A score of a method over its seeds.

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
        values: by name: "loss", the mean training loss since the point before, and metrics on the test data. Nothing
            is chosen by them during training.
    """

    seed: int
    step: tuple[int, ...] = ()
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def add(self, step: int, **values: float) -> Curve:
        """This curve with one more point."""
        longer = {name: (*self.values.get(name, ()), value) for name, value in values.items()}
        return Curve(self.seed, (*self.step, step), longer)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        return cls(values["seed"], tuple(values["step"]), _tuples(values["values"]))


@dataclass(frozen=True)
class MethodResult:
    """One row of the table.

    Args:
        method: the name given to `--methods`.
        status: "ok" when it was measured and every seed finished, else "failed".
        scores: by the names of the metrics.
        error: what went wrong, in one line; None when ok.
        rank: 1 + how many methods are better by more than the spread; None when failed.
        tied_with: methods whose difference from this one is smaller than the spread.
        steps: optimiser steps every trial of the method was given; 0 where the track has none.
        costs: by the names of the costs; None where it is not known.
        curves: one per seed that began.
    """

    method: str
    status: Literal["ok", "failed"]
    scores: dict[str, Score]
    error: str | None = None
    rank: int | None = None
    tied_with: tuple[str, ...] = ()
    steps: int = 0
    costs: dict[str, float | None] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()


@dataclass(frozen=True)
class Best:
    """The best seed of the first-ranked method, where the track trains models.

    Args:
        method, seed: which trial.
        path: folder of the trained model, relative to the folder of results.json.
    """

    method: str
    seed: int
    path: str


@dataclass(frozen=True)
class Results:
    """Everything `heed compare` found; see the module for the parts.

    Args:
        track: name of the track.
        settings: the settings of the run, as JSON.
        machine, data: where and on what.
        metrics: the scores; methods are ranked by the first.
        costs: what a method costs.
        methods: in order of rank, those that failed last.
        best: None when every method failed, or the track trains no models.
        schema: version of this layout.
    """

    track: str
    settings: dict[str, Any]
    machine: Machine
    data: DataSummary
    metrics: tuple[Metric, ...]
    costs: tuple[Cost, ...] = ()
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
                data=DataSummary(**{**values["data"], "notes": tuple(values["data"]["notes"])}),
                metrics=tuple(Metric(**metric) for metric in values["metrics"]),
                costs=tuple(Cost(**cost) for cost in values["costs"]),
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
    values["scores"] = {name: Score(**_tuples(score)) for name, score in row["scores"].items()}
    values["curves"] = tuple(Curve.from_json(curve) for curve in row["curves"])
    return MethodResult(**values)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
