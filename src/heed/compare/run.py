"""A comparison from settings to results: the plan of trials, where they run, and what is kept between two starts.

    OUT/
      run.json              settings and digest of the data: what a second start must agree with
      data.safetensors      the images, as every trial reads them
      samples.safetensors   six test images as the models see them, with their labels
      measures/METHOD.json  costs, and the number of steps
      trials/METHOD-SEED/   see `heed.compare.trial`
      best/                 copy of the best trial's model
      results.json          written last

Every file appears whole or not at all, and what is there is not done again; that is how a killed run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock, Timeout

from heed.checkpoint import write_atomically
from heed.compare.executors import Executor, InProcess, OnRay, Processes, Task
from heed.compare.host import check_methods
from heed.compare.learner import batch_size, check_device, device_kind, is_leader, join_processes, meet, repeatable
from heed.compare.measure import Measures, describe_machine, measure, usable_cores
from heed.compare.progress import Progress, Report
from heed.compare.rank import accuracy_over_seeds, rank
from heed.compare.results import Best, Curve, DataSummary, Machine, MethodResult, Results
from heed.compare.settings import Settings
from heed.compare.trial import POINTS, TrialResult, describe_error, run_trial, trial_folder
from heed.data.images import ImageData, load_images

IMAGES_SEEN = 30_000  # per trial, where no budget is given: small data sets are repeated more often,
EPOCHS = (5, 200)  # within these bounds
SAMPLES = 6

_FILES = ("run.json", "results.json", "data.safetensors", "samples.safetensors")
_FOLDERS = ("measures", "trials", "best")


def run_classify(settings: Settings, *, on_progress: Report | None = None) -> Results:
    """See `heed.compare.classify`."""
    check_methods(settings.methods, settings.host)
    device_kind(settings.device)
    if settings.ray is None:  # a cluster's workers have devices of their own
        check_device(settings.device, settings.precision)
    join_processes(settings)
    report = on_progress if on_progress is not None and is_leader() else _ignore
    settings = dataclasses.replace(settings, out=str(Path(settings.out).expanduser().resolve()))
    out = Path(settings.out)
    with _folder(out):
        data = load_images(settings.data, strict=settings.strict, image_size=settings.image_size)
        if is_leader():
            _begin(settings, data)
        meet()
        executor, threads = _executor(settings)
        _measure(settings, executor, threads, report)
        meet()
        _train(settings, executor, threads, report)
        results = _collect(settings, data, threads)
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


def _begin(settings: Settings, data: ImageData) -> None:
    """Start a run in its folder, or make sure that the run found there is this one."""
    out = Path(settings.out)
    # Through JSON, so that it compares equal to what was read.
    identity = json.loads(json.dumps({"settings": settings.identity(), "data": data.fingerprint()}))
    record = out / "run.json"
    if settings.fresh:
        for name in _FILES:
            (out / name).unlink(missing_ok=True)
        for name in _FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
    if record.is_file():
        _agree(record, identity)
        return
    data.save(out / "data.safetensors")
    _save_samples(out / "samples.safetensors", data)
    write_atomically(record, json.dumps(identity, indent=1) + "\n")


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


def _save_samples(path: Path, data: ImageData) -> None:
    """Test images of as many classes as there is room for, as floats (n, C, S, S), and their labels (n,)."""
    first = [int(torch.nonzero(data.test_labels == label)[0]) for label in data.test_labels.unique()]
    rest = [i for i in range(len(data.test_labels)) if i not in set(first)]
    chosen = torch.tensor((first + rest)[:SAMPLES])
    mean, std = (x.view(-1, 1, 1) for x in data.statistics())
    images = (data.test_images[chosen].float() / 255 - mean) / std
    write_atomically(path, safetensors.torch.save({"images": images, "labels": data.test_labels[chosen]}))


def _executor(settings: Settings) -> tuple[Executor, int]:
    """Where the trials run, and with how many threads each."""
    if settings.ray is not None:
        threads = settings.threads or 1
        return OnRay(settings.ray, threads, accelerator=settings.device != "cpu"), threads
    threads = settings.threads or max(1, usable_cores() // settings.jobs)
    return (InProcess() if settings.jobs == 1 else Processes(settings.jobs)), threads


def _measure(settings: Settings, executor: Executor, threads: int, report: Report) -> None:
    """Measure the methods not measured yet, one at a time, so that they do not slow each other down."""
    share = None
    if settings.minutes is not None:
        share = 60 * settings.minutes * executor.parallel / (len(settings.methods) * settings.seeds)
    todo = [method for method in settings.methods if "measures" not in _measures(settings, method)]
    tasks: list[Task] = [partial(_measure_task, settings, method, threads, share) for method in todo]
    for index, died in executor.run(tasks, report, one_by_one=True):
        if died:
            _fail_measuring(settings, todo[index], died, report)


def _measure_task(settings: Settings, method: str, threads: int, share: float | None, report: Report) -> None:
    report(Progress(method, None, "measuring"))
    try:
        data = _data(settings.out)
        with repeatable(threads, settings.device):
            torch.manual_seed(0)
            found = measure(settings, method, data, threads)
        steps = _steps(settings, data, found, share)
    except Exception as error:
        # As in a trial: whatever a method does, the others go on.
        _fail_measuring(settings, method, describe_error(error), report)
        return
    content = {"steps": steps, "measures": dataclasses.asdict(found)}
    if is_leader():
        write_atomically(_measures_file(settings, method), json.dumps(content))
    report(Progress(method, None, "measured"))


def _fail_measuring(settings: Settings, method: str, error: str, report: Report) -> None:
    write_atomically(_measures_file(settings, method), json.dumps({"error": error}))
    report(Progress(method, None, "failed", error=error))


def _measures_file(settings: Settings, method: str) -> Path:
    return Path(settings.out) / "measures" / f"{method}.json"


def _measures(settings: Settings, method: str) -> dict[str, Any]:
    file = _measures_file(settings, method)
    return json.loads(file.read_text()) if file.is_file() else {}


def _steps(settings: Settings, data: ImageData, found: Measures, share: float | None) -> int:
    """Optimiser steps of every trial of a method; `share` is the seconds it has where the budget is time."""
    if settings.steps is not None:
        return settings.steps
    batch = batch_size(settings, data)
    if share is not None:
        testing = POINTS * len(data.test_labels) / found.infer_images_per_second
        return max(1, int((share - testing) * found.train_images_per_second / batch))
    images = len(data.train_labels)
    epochs = settings.epochs or min(max(math.ceil(IMAGES_SEEN / images), EPOCHS[0]), EPOCHS[1])
    return epochs * (images // batch)


def _train(settings: Settings, executor: Executor, threads: int, report: Report) -> None:
    """Run the trials not done yet; those that failed are tried again."""
    todo = []
    for seed in range(settings.seeds):
        for method in settings.methods:
            steps = _measures(settings, method).get("steps")
            done = _result(settings, method, seed)
            if done is not None and done.status == "ok":
                report(Progress(method, seed, "trained", done.steps, done.steps, None, done.accuracy))
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
    run_trial(settings, method, seed, steps, _data(settings.out), threads=threads, report=report, device=device)


def _devices(settings: Settings) -> Sequence[str]:
    """The devices that trials take in turn: with several jobs, all GPUs of this machine."""
    if settings.jobs > 1 and settings.device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [settings.device]


def _data(out: str) -> ImageData:
    return ImageData.load(Path(out) / "data.safetensors")


def _result_file(settings: Settings, method: str, seed: int) -> Path:
    return trial_folder(Path(settings.out), method, seed) / "result.json"


def _result(settings: Settings, method: str, seed: int) -> TrialResult | None:
    file = _result_file(settings, method, seed)
    return TrialResult.read(file) if file.is_file() else None


def _collect(settings: Settings, data: ImageData, threads: int) -> Results:
    rows = rank([_row(settings, method) for method in settings.methods], len(data.test_labels))
    machines = [
        found["measures"]["machine"] for m in settings.methods if (found := _measures(settings, m)).get("measures")
    ]
    return Results(
        track="classify",
        settings=settings.to_json(),
        machine=Machine(**machines[0]) if machines else describe_machine(torch.device("cpu"), threads),
        data=DataSummary(
            data.name,
            data.classes,
            len(data.train_labels),
            len(data.test_labels),
            (data.channels, data.side, data.side),
            data.notes,
        ),
        methods=rows,
        best=_best(rows),
    )


def _row(settings: Settings, method: str) -> MethodResult:
    found = _measures(settings, method)
    trials = [_result(settings, method, seed) for seed in range(settings.seeds)]
    errors = [f"seed {t.seed}: {t.error}" for t in trials if t is not None and t.status == "failed"]
    if found.get("error"):
        errors.insert(0, f"could not be measured: {found['error']}")
    costs = {key: value for key, value in found.get("measures", {}).items() if key != "machine"}
    return MethodResult(
        method=method,
        status="failed" if errors else "ok",
        accuracy=accuracy_over_seeds([None if t is None else t.accuracy for t in trials]),
        error="; ".join(errors) or None,
        steps=found.get("steps"),
        curves=tuple(t.curve for t in trials if t is not None),
        **costs,
    )


def _best(rows: Sequence[MethodResult]) -> Best | None:
    if not rows or rows[0].status != "ok":
        return None
    reached = rows[0].accuracy.per_seed
    return Best(rows[0].method, max(range(len(reached)), key=lambda seed: reached[seed] or 0.0), "best")


def _keep_best(out: Path, best: Best) -> None:
    """Copy the best trial's model to its place."""
    aside = out / ".best"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(trial_folder(out, best.method, best.seed) / "model", aside)
    shutil.rmtree(out / best.path, ignore_errors=True)
    aside.rename(out / best.path)


def _ignore(news: Progress) -> None:
    """Where nobody wants to know."""
