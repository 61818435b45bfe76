"""Whole comparisons: in this process, in several, on Ray, killed and taken up again."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import heed
from heed.compare import ClassifySettings, Results, run
from heed.compare.executors import Processes
from heed.compare.progress import LiveProgress, Progress
from heed.layers.registry import layers

METHODS = ("softmax", "neighborhood")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An idx data set of two classes that differ a little in brightness."""
    folder = tmp_path_factory.mktemp("idx")
    labels = (np.arange(60) % 2).astype("u1")
    pixels = np.random.default_rng(0).integers(0, 200, (60, 8, 8), dtype="u1") + 20 * labels[:, None, None]
    header = bytes([0, 0, 8, 3]) + np.array([60, 8, 8], ">u4").tobytes()
    (folder / "images-idx3-ubyte").write_bytes(header + pixels.astype("u1").tobytes())
    (folder / "labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + np.array([60], ">u4").tobytes() + labels.tobytes())
    return str(folder)


def settings_for(images, out, **changes):
    chosen = {"steps": 8, "seeds": 2, "batch_size": 8, "threads": 1, "device": "cpu", **changes}
    return ClassifySettings(chosen.pop("methods", METHODS), data=images, out=str(out), **chosen)


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    return run(settings_for(images, tmp_path_factory.mktemp("undisturbed")))


def table(results):
    """What must not depend on how a run was carried out."""
    return [
        (r.method, r.status, r.rank, r.tied_with, r.scores, r.steps, r.costs["flops"], r.curves)
        for r in results.methods
    ]


def test_results(undisturbed):
    out = Path(undisturbed.settings["out"])
    assert Results.read(out / "results.json") == undisturbed
    assert {row.method for row in undisturbed.methods} == set(METHODS)
    assert all(row.status == "ok" and len(row.curves) == 2 for row in undisturbed.methods)
    assert (undisturbed.data.train, undisturbed.data.test, undisturbed.data.details["image"]) == (48, 12, [1, 8, 8])
    best = undisturbed.best
    trial = heed.from_pretrained(out / "trials" / f"{best.method}-{best.seed}" / "model").state_dict()
    assert all(torch.equal(v, trial[k]) for k, v in heed.from_pretrained(out / best.path).state_dict().items())
    samples = safetensors.torch.load_file(out / "samples.safetensors")
    assert samples["images"].shape == (6, 1, 8, 8)
    assert set(samples["labels"].tolist()) == {0, 1}


def test_a_finished_run_is_not_done_again(images, undisturbed):
    news = []
    again = run(settings_for(images, undisturbed.settings["out"]), on_progress=news.append)
    assert again == undisturbed
    assert {n.stage for n in news} == {"trained"}


def test_a_run_with_other_settings_is_refused_unless_fresh(images, tmp_path):
    run(settings_for(images, tmp_path, methods=("softmax",), steps=1, seeds=1))
    other = settings_for(images, tmp_path, methods=("softmax",), steps=2, seeds=1)
    with pytest.raises(ValueError, match=r"other settings: steps was 1 and is 2; choose another --out.*--fresh"):
        run(other)
    assert run(dataclasses.replace(other, fresh=True)).methods[0].steps == 2


def test_a_method_that_crashes_is_a_row(images, tmp_path, monkeypatch):
    layers.names()
    monkeypatch.setitem(layers._entries, "unbuildable", lambda dim, num_heads, grid: 1 / 0)
    results = run(settings_for(images, tmp_path, methods=("unbuildable", "softmax"), seeds=1))
    fine, failed = results.methods
    assert (fine.method, fine.status, fine.rank) == ("softmax", "ok", 1)
    assert (failed.method, failed.status, failed.rank) == ("unbuildable", "failed", None)
    assert failed.error == "could not be measured: ZeroDivisionError: division by zero"
    assert Results.read(tmp_path / "results.json") == results


def test_minutes_give_every_trial_its_share(images, tmp_path):
    results = run(settings_for(images, tmp_path, methods=("softmax",), steps=None, minutes=0.02, seeds=1))
    row = results.methods[0]
    training = 0.02 * 60 - 8 * results.data.test / row.costs["infer"]
    assert row.steps == max(1, int(training * row.costs["train"] / 8))


def test_folders_that_cannot_be_used(images, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        run(settings_for(images, file))
    with pytest.raises(OSError, match="cannot be written"):
        run(settings_for(images, "/proc/heed"))


def test_unknown_methods_stop_the_run_before_it_begins(images, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'softmax'"):
        run(settings_for(images, tmp_path / "out", methods=("softmaks",)))
    assert not (tmp_path / "out").exists()


def test_a_killed_run_goes_on_and_ends_the_same(images, tmp_path, undisturbed):
    settings = settings_for(images, tmp_path)
    script = f"from heed.compare import ClassifySettings, run; run({settings!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        while not list(tmp_path.glob("trials/*/checkpoint-*")):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "results.json").exists()
    assert table(run(settings)) == table(undisturbed)


def test_several_processes_find_the_same(images, tmp_path, undisturbed):
    news = []
    results = run(settings_for(images, tmp_path, jobs=2), on_progress=news.append)
    assert table(results) == table(undisturbed)
    assert sum(n.stage == "trained" for n in news) == 4


@pytest.mark.slow
def test_two_launched_processes_share_every_trial(images, tmp_path, undisturbed):
    script = tmp_path / "launched.py"
    settings = settings_for(images, tmp_path / "out")
    script.write_text(f"from heed.compare import ClassifySettings, run\nrun({settings!r})\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    subprocess.run(launch, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    results = Results.read(tmp_path / "out" / "results.json")
    alone = {row.method: row for row in undisturbed.methods}
    for row in results.methods:
        assert row.status == "ok"
        # The gradient is the same sum in another order.
        for curve, other in zip(row.curves, alone[row.method].curves, strict=True):
            assert curve.values["loss"] == pytest.approx(other.values["loss"], abs=1e-3)


def _mark(path, report):
    report(Progress("softmax", 0, "training", 1, 2))
    Path(path).touch()


def _die(report):
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_death_of_a_worker_ends_its_task_alone(tmp_path):
    tasks = [_die, *(partial(_mark, str(tmp_path / str(i))) for i in range(3))]
    news = []
    ended = dict(Processes(2).run(tasks, news.append))
    assert "died" in ended.pop(0)
    assert ended == {1: None, 2: None, 3: None}
    assert len(list(tmp_path.iterdir())) == 3
    assert news


def test_two_ray_workers_find_the_same(images, tmp_path, undisturbed, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        news = []
        results = run(settings_for(images, tmp_path, ray="auto"), on_progress=news.append)
    finally:
        ray.shutdown()
    assert table(results) == table(undisturbed)
    assert sum(n.stage == "trained" for n in news) == 4


def test_the_display_takes_all_news(capsys):
    with LiveProgress(("softmax", "hilo"), 1) as show:
        show(Progress("softmax", None, "measuring"))
        show(Progress("softmax", None, "measured"))
        show(Progress("softmax", 0, "training", 1, 2, 0.5))
        show(Progress("softmax", 0, "training", 2, 2, 0.5, "accuracy 75.0 %"))
        show(Progress("softmax", 0, "trained", 2, 2, None, "accuracy 75.0 %"))
        show(Progress("hilo", None, "failed", error="broke"))
    printed = capsys.readouterr().out
    assert "softmax, seed 0: accuracy 75.0 %" in printed
    assert "hilo: failed: broke" in printed


def test_an_idle_display_goes_when_a_setting_is_wrong(capsys):
    with pytest.raises(ValueError, match="wrong"), LiveProgress(("softmax",), 1):
        raise ValueError("wrong")
    assert "trials" not in capsys.readouterr().out
