"""The settings of a comparison: one immutable value that says everything a run depends on.

`Settings` holds what every track has; each track adds its own.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

PRECISIONS = ("fp32", "bf16", "fp16")
# How a run is carried out; two runs that differ in these alone find the same scores and may share a folder.
EXECUTION = frozenset({"out", "jobs", "ray", "fresh"})


@dataclass(frozen=True)
class Settings:
    """What every comparison is asked to do.

    Args:
        methods: names of what is compared.
        data: what it is compared on; each track says what it takes.
        out: folder for everything the run writes.
        seeds: trials per method, with seeds 0, 1, ...
        device: "auto", "cpu", "cuda", "cuda:1", "mps", ...
        jobs: processes that run trials; 1 runs them in this process.
        ray: address of a Ray cluster ("auto", "local", "ray://host:port"), None for no Ray; `out` must be a folder that
            all its machines see.
        threads: CPU threads per trial; None shares the cores (or OMP_NUM_THREADS, where it is set) out among the jobs.
            Scores repeat bit for bit on a CPU when this number is the same.
        fresh: throw away an earlier run in `out`.
    """

    track: ClassVar[str]

    methods: tuple[str, ...]
    data: str = ""
    out: str = "runs"
    seeds: int = 3
    device: str = "auto"
    jobs: int = 1
    ray: str | None = None
    threads: int | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.methods, str):
            raise TypeError(f"methods={self.methods!r}: give a tuple of names")
        object.__setattr__(self, "methods", tuple(self.methods))
        if not self.methods:
            raise ValueError("methods is empty: name at least one")
        twice = {name for name in self.methods if self.methods.count(name) > 1}
        if twice:
            raise ValueError(f"methods names {', '.join(sorted(twice))} more than once")
        self.check_counts("seeds", "jobs", "threads")
        if self.ray is not None and self.jobs > 1:
            raise ValueError(f"jobs={self.jobs} and ray={self.ray!r} are given together; choose one")

    def check_counts(self, *names: str) -> None:
        """ValueError for a setting that is neither None nor a whole number of at least 1."""
        for name in names:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: give a whole number of at least 1")

    def check_positive(self, *names: str) -> None:
        """ValueError for a setting that is neither None nor a number above 0."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r}: give a number above 0")

    def check_not_negative(self, *names: str) -> None:
        """ValueError for a setting that is not a number of at least 0."""
        for name in names:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value!r}: give a number of at least 0")

    def check_one_budget(self, *names: str) -> None:
        """ValueError when more than one of these is given."""
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given together; choose one budget")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for results.json."""
        return {**dataclasses.asdict(self), "methods": list(self.methods)}

    def identity(self) -> dict[str, Any]:
        """The settings that results depend on."""
        return {key: value for key, value in self.to_json().items() if key not in EXECUTION}
