"""A comparison from settings to results: the plan of trials, where they run, and what is kept between two starts.

    OUT/
      run.json              settings, digest of the data and names of its files: what a second start must agree with
      ...                   the data, as the track writes it and every trial reads it
      measures/METHOD.json  costs, and the number of steps
      trials/METHOD-SEED/   see `heed.compare.trial`
      best/                 copy of the best trial's model, where the track trains models
      results.json          written last

Every file appears whole or not at all, and what is there is not done again; that is how a killed run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from heed.checkpoint import write_atomically
from heed.compare.executors import Executor, InProcess, OnRay, Processes, Task
from heed.compare.machine import (
    check_device,
    default_threads,
    describe_machine,
    device_kind,
    is_leader,
    join_processes,
    meet,
)
from heed.compare.progress import Progress, Report
from heed.compare.rank import rank, score_over_seeds
from heed.compare.results import Best, Curve, Machine, MethodResult, Results
from heed.compare.settings import Settings
from heed.compare.track import Track, track_of
from heed.compare.trial import TrialResult, describe_error, ended, run_trial, trial_folder

_FOLDERS = ("measures", "trials", "best")


def run(settings: Settings, *, on_progress: Report | None = None) -> Results:
    """See `heed.compare.run`."""
    track = track_of(settings)
    device_kind(settings.device)
    if settings.ray is None:  # a cluster's workers have devices of their own
        check_device(settings.device)
    track.check(settings)
    join_processes(settings)
    report = on_progress if on_progress is not None and is_leader() else _ignore
    settings = dataclasses.replace(settings, out=str(Path(settings.out).expanduser().resolve()))
    out = Path(settings.out)
    with _folder(out):
        data = track.load(settings)
        if is_leader():
            _begin(track, settings, data)
        meet()
        executor, threads = _executor(settings)
        _measure(settings, executor, threads, report)
        meet()
        _train(track, settings, executor, threads, report)
        results = _collect(track, settings, data, threads)
        if is_leader():
            if results.best is not None:
                _keep_best(out, results.best)
            results.write(out / "results.json")
        meet()
    return results


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Make the folder, see that it can be written, and keep a second run out of it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if is_leader():
            write_atomically(out / ".writable", "")
            (out / ".writable").unlink()
    except OSError as error:
        raise OSError(f"out={str(out)!r} cannot be written ({error.strerror}); choose another folder") from error
    lock = FileLock(out / ".lock")
    try:
        if is_leader():
            lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"out={str(out)!r} is in use by another run; wait for it, or choose another folder") from error
    try:
        yield
    finally:
        lock.release()


def _begin(track: Track, settings: Settings, data: Any) -> None:
    """Start a run in its folder, or make sure that the run found there is this one."""
    out = Path(settings.out)
    # Through JSON, so that it compares equal to what was read.
    identity = json.loads(json.dumps({"settings": settings.identity(), "data": track.fingerprint(data)}))
    identity["settings"]["track"] = track.name
    record = out / "run.json"
    if settings.fresh:
        _throw_away(out)
    if record.is_file():
        _agree(record, identity)
        return
    files = track.save(data, out)
    write_atomically(record, json.dumps({**identity, "files": files}, indent=1) + "\n")


def _throw_away(out: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    record = out / "run.json"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        for name in json.loads(record.read_text()).get("files", ()):
            (out / Path(name).name).unlink(missing_ok=True)
    for name in ("run.json", "results.json"):
        (out / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)


def _agree(record: Path, identity: dict[str, Any]) -> None:
    remedy = "choose another --out, or throw that run away with --fresh"
    try:
        before = json.loads(record.read_text())
        old = before["settings"]
        data_changed = before["data"] != identity["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record} is not the record of a run; {remedy}") from error
    new = identity["settings"]
    changed = [
        f"{k} was {old.get(k)!r} and is {new.get(k)!r}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)
    ]
    if changed:
        raise ValueError(f"{record.parent} holds a run with other settings: {', '.join(changed)}; {remedy}")
    if data_changed:
        raise ValueError(f"{record.parent} holds a run on other data: {new['data']!r} has changed since; {remedy}")


def _executor(settings: Settings) -> tuple[Executor, int]:
    """Where the trials run, and with how many threads each."""
    if settings.ray is not None:
        threads = settings.threads or 1
        return OnRay(settings.ray, threads, accelerator=settings.device != "cpu"), threads
    threads = settings.threads or max(1, default_threads() // settings.jobs)
    return (InProcess() if settings.jobs == 1 else Processes(settings.jobs)), threads


def _measure(settings: Settings, executor: Executor, threads: int, report: Report) -> None:
    """Measure the methods not measured yet, one at a time, so that they do not slow each other down."""
    todo = [method for method in settings.methods if "steps" not in _measures(settings, method)]
    tasks: list[Task] = [partial(_measure_task, settings, method, threads, executor.parallel) for method in todo]
    for index, died in executor.run(tasks, report, one_by_one=True):
        if died:
            _fail_measuring(settings, todo[index], died, report)


def _measure_task(settings: Settings, method: str, threads: int, parallel: int, report: Report) -> None:
    report(Progress(method, None, "measuring"))
    track = track_of(settings)
    try:
        found = track.measure(settings, method, track.read(settings), threads, parallel)
    except Exception as error:
        # As in a trial: whatever a method does, the others go on.
        _fail_measuring(settings, method, describe_error(error), report)
        return
    if is_leader():
        write_atomically(_measures_file(settings, method), json.dumps(dataclasses.asdict(found)))
    report(Progress(method, None, "measured"))


def _fail_measuring(settings: Settings, method: str, error: str, report: Report) -> None:
    write_atomically(_measures_file(settings, method), json.dumps({"error": error}))
    report(Progress(method, None, "failed", error=error))


def _measures_file(settings: Settings, method: str) -> Path:
    return Path(settings.out) / "measures" / f"{method}.json"


def _measures(settings: Settings, method: str) -> dict[str, Any]:
    file = _measures_file(settings, method)
    return json.loads(file.read_text()) if file.is_file() else {}


def _train(track: Track, settings: Settings, executor: Executor, threads: int, report: Report) -> None:
    """Run the trials not done yet; those that failed are tried again."""
    todo = []
    for seed in range(settings.seeds):
        for method in settings.methods:
            steps = _measures(settings, method).get("steps")
            done = _result(settings, method, seed)
            if done is not None and done.status == "ok":
                report(ended(track, done))
            elif steps is not None:
                todo.append((method, seed, steps))
    devices = _devices(settings)
    tasks: list[Task] = [
        partial(_trial_task, settings, *trial, threads, devices[index % len(devices)])
        for index, trial in enumerate(todo)
    ]
    for index, died in executor.run(tasks, report):
        method, seed, steps = todo[index]
        if died is None and _result(settings, method, seed) is None:
            died = f"it left no result in {settings.out}; with --ray, that folder must be one all machines see"
        if died:
            TrialResult(method, seed, steps, "failed", Curve(seed), error=died).write(
                _result_file(settings, method, seed)
            )
            report(Progress(method, seed, "failed", error=died))


def _trial_task(
    settings: Settings, method: str, seed: int, steps: int, threads: int, device: str, report: Report
) -> None:
    data = track_of(settings).read(settings)
    run_trial(settings, method, seed, steps, data, threads=threads, report=report, device=device)


def _devices(settings: Settings) -> Sequence[str]:
    """The devices that trials take in turn: with several jobs, all GPUs of this machine."""
    if settings.jobs > 1 and settings.device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [settings.device]


def _result_file(settings: Settings, method: str, seed: int) -> Path:
    return trial_folder(Path(settings.out), method, seed) / "result.json"


def _result(settings: Settings, method: str, seed: int) -> TrialResult | None:
    file = _result_file(settings, method, seed)
    return TrialResult.read(file) if file.is_file() else None


def _collect(track: Track, settings: Settings, data: Any, threads: int) -> Results:
    summary = track.describe(data)
    rows = rank([_row(track, settings, method) for method in settings.methods], track.metrics[0], summary.test)
    machines = [found["machine"] for m in settings.methods if (found := _measures(settings, m)).get("machine")]
    return Results(
        track=track.name,
        settings=settings.to_json(),
        machine=Machine(**machines[0]) if machines else describe_machine(torch.device("cpu"), threads),
        data=summary,
        metrics=track.metrics,
        costs=track.costs,
        methods=rows,
        best=_best(track, Path(settings.out), rows),
    )


def _row(track: Track, settings: Settings, method: str) -> MethodResult:
    found = _measures(settings, method)
    trials = [_result(settings, method, seed) for seed in range(settings.seeds)]
    errors = [f"seed {t.seed}: {t.error}" for t in trials if t is not None and t.status == "failed"]
    if found.get("error"):
        errors.insert(0, f"could not be measured: {found['error']}")
    costs = dict(found.get("costs", {}))
    for cost in track.costs:
        within = [t.costs[cost.name] for t in trials if t is not None and cost.name in t.costs]
        if within:
            costs[cost.name] = statistics.median(within)
    return MethodResult(
        method=method,
        status="failed" if errors else "ok",
        scores={
            metric.name: score_over_seeds([None if t is None else t.scores.get(metric.name) for t in trials])
            for metric in track.metrics
        },
        error="; ".join(errors) or None,
        steps=found.get("steps", 0),
        costs=costs,
        curves=tuple(t.curve for t in trials if t is not None),
    )


def _best(track: Track, out: Path, rows: Sequence[MethodResult]) -> Best | None:
    if not rows or rows[0].status != "ok":
        return None
    metric = track.metrics[0]
    reached = {seed: score for seed, score in enumerate(rows[0].scores[metric.name].per_seed) if score is not None}
    best = (max if metric.better == "higher" else min)(reached, key=reached.__getitem__)
    has_model = (trial_folder(out, rows[0].method, best) / "model").is_dir()
    return Best(rows[0].method, best, "best") if has_model else None


def _keep_best(out: Path, best: Best) -> None:
    """Copy the best trial's model to its place."""
    aside = out / ".best"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(trial_folder(out, best.method, best.seed) / "model", aside)
    shutil.rmtree(out / best.path, ignore_errors=True)
    aside.rename(out / best.path)


def _ignore(news: Progress) -> None:
    """Where nobody wants to know."""
