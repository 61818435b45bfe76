"""heed compare pretrain: whole runs on made images, what they leave, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import heed
from heed.compare import PretrainSettings, Results, run
from heed.compare.report import write_report
from heed.compare.tracks.pretrain import training
from heed.compare.tracks.pretrain.host import build_host, build_objective
from heed.compare.tracks.pretrain.track import TRACK
from heed.compare.tracks.pretrain.training import with_labels
from heed.data.images import ImageData
from heed.pretrain.encoders import encoder_for

METHODS = ("mae-random", "mae-grid", "scratch")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """A folder of two classes of colour pictures that differ in brightness."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, base in (("dark", 0), ("bright", 100)):
        (folder / name).mkdir()
        for i in range(24):
            Image.fromarray(rng.integers(base, base + 150, (8, 8, 3), np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


def settings_for(images: str, out: Path, **changes) -> PretrainSettings:
    chosen = {"steps": 4, "finetune_epochs": 4, "seeds": 1, "batch_size": 8, "threads": 1, "device": "cpu", **changes}
    return PretrainSettings(chosen.pop("methods", METHODS), data=images, out=str(out), **chosen)


@pytest.fixture(scope="module")
def results(images, tmp_path_factory) -> Results:
    return run(settings_for(images, tmp_path_factory.mktemp("run")))


def test_a_run_takes_three_scores_of_every_method(results) -> None:
    assert [metric.name for metric in results.metrics] == ["finetuned", "probe", "knn"]
    rows = {row.method: row for row in results.methods}
    assert set(rows) == set(METHODS)
    for row in rows.values():
        assert row.status == "ok", row.error
        assert all(0.5 <= score.mean <= 1 for score in row.scores.values())
        assert len(row.curves) == 1
        assert row.costs["parameters"] > 0
    assert rows["scratch"].steps == 0
    assert rows["scratch"].costs.get("loss") is None
    assert rows["mae-random"].steps == rows["mae-grid"].steps == 4
    assert rows["mae-random"].costs["loss"] > 0
    assert rows["mae-random"].costs["parameters"] == rows["mae-grid"].costs["parameters"]


def test_it_leaves_encoders_classifiers_and_pictures(results) -> None:
    out = Path(results.settings["out"])
    before, after = (heed.from_pretrained(out / "trials/mae-random-0" / name) for name in ("pretrained", "model"))
    assert not torch.equal(before.norm.weight, after.norm.weight)
    assert heed.from_pretrained(out / "best")(torch.zeros(1, 3, 8, 8)).shape == (1, 2)
    pictures = load_file(out / "trials/mae-random-0/pictures.safetensors")
    assert set(pictures) == {"input", "masked", "reconstructed"}
    assert all(p.shape == (6, 3, 8, 8) for p in pictures.values())
    torch.testing.assert_close(pictures["input"] * 255, (pictures["input"] * 255).round(), rtol=0, atol=1e-3)
    assert pictures["masked"].isnan().float().mean() == 0.75


def test_the_report_shows_them(results, tmp_path) -> None:
    page = write_report(results, results.settings["out"]).read_text()
    assert "What they saw, and what they made of it" in page
    assert page.count("data:image/png") == 6 + 2 * 2 * 6
    assert "/pretrained" in page
    assert "What they saw" not in write_report(results, tmp_path).read_text(), "there are no pictures there"


def test_the_same_again_bit_for_bit_also_after_a_stop(images, results, tmp_path, monkeypatch) -> None:
    """A trial that is stopped between pre-training and fine-tuning goes on from its checkpoint."""
    settings = settings_for(images, tmp_path, methods=("mae-random",))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "frozen_scores", stop)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    assert list(tmp_path.glob("trials/*/checkpoint-00000004"))
    again = run(settings).methods[0]
    first = next(row for row in results.methods if row.method == "mae-random")
    assert {name: score.per_seed[0] for name, score in again.scores.items()} == {
        name: score.per_seed[0] for name, score in first.scores.items()
    }
    assert again.curves[0] == first.curves[0]


def test_every_method_starts_from_the_same_encoder(images, tmp_path) -> None:
    settings = settings_for(images, tmp_path)
    data = TRACK.load(settings)
    states = []
    for method in METHODS:
        torch.manual_seed(0)
        model = build_host(settings, data)
        objective = build_objective(settings, method, model)
        assert (objective is None) == (method == "scratch")
        assert encoder_for(model).grid == (4, 4)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], state[key]) for state in states for key in states[0])


def test_few_labels_are_the_same_few_of_every_class() -> None:
    labels = torch.arange(30) % 3
    pixels = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    data = ImageData("made", ("a", "b", "c"), pixels, labels, pixels, labels)
    few = with_labels(data, 2)
    assert few.train_labels.bincount().tolist() == [2, 2, 2]
    assert torch.equal(few.train_images[:, 0, 0, 0] % 3, few.train_labels.to(torch.uint8))
    assert torch.equal(few.train_images, with_labels(data, 2).train_images)
    assert with_labels(data, None) is data
    assert len(with_labels(data, 99).train_labels) == 30


def test_a_mask_that_does_not_fit_is_a_row(images, tmp_path) -> None:
    settings = settings_for(images, tmp_path, methods=("mae-grid", "scratch"), image_size=6)
    fine, failed = run(settings).methods
    assert fine.method == "scratch"
    assert "a grid of 3 x 3 tokens is not tiled by cells of side 2" in str(failed.error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("mae-grean",)}, "did you mean 'mae-green'"),
        ({"host": "litv2_micro"}, "'litv2_micro' is no vision transformer with dense attention"),
        ({"precision": "fp16"}, "needs an accelerator"),
    ],
)
def test_methods_and_hosts_are_checked_before_anything_is_written(changes, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        run(settings_for("digits", tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "epochs and steps are given together"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0"),
        ({"labels": 0}, "labels=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"augment": "flop"}, "did you mean 'flip'"),
        ({"precision": "fp61"}, "did you mean 'fp16'"),
    ],
)
def test_settings_are_checked(changes, message) -> None:
    fine = settings_for("digits", Path("out"))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(fine, **changes)


def test_the_command(images, tmp_path) -> None:
    from typer.testing import CliRunner

    from heed.cli import app

    options = ["--steps", "2", "--finetune-epochs", "1", "--seeds", "1", "--batch-size", "8", "--threads", "1"]
    command = ["compare", "pretrain", "--methods", "mae-random,scratch", "--data", images, "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").is_file()
