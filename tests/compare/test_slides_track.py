"""The track `slides`: on digits and on a folder of slides, its report, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import heed
from heed.cli import app
from heed.compare import SlidesSettings, run
from heed.compare.report import write_report
from heed.compare.results import Results
from heed.compare.tracks.slides import track as slides_track
from heed.compare.tracks.slides.methods import METHODS, build_model, reduced_width
from heed.data.slides import digit_bags

FAST: dict[str, Any] = {"epochs": 2, "seeds": 2, "device": "cpu", "threads": 1, "dim": 16, "n_token": 2}


@pytest.fixture(autouse=True)
def _few_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slides_track, "_TIMED_SECONDS", 0.01)
    monkeypatch.setattr("heed.data.slides.digit_bags.__defaults__", ((12, 8, 8), 20, 3, 0))


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """Slides on a grid of patches; in those of label 1 some patches stand out."""
    folder = tmp_path / "features"
    folder.mkdir()
    rows = ["slide,label,patient"]
    for i in range(18):
        x = torch.randn(20 + i, 8)
        x[:4, 0] += 5 * (i % 3)
        coords = torch.stack([torch.arange(len(x)) % 6, torch.arange(len(x)) // 6], 1) * 256
        save_file({"features": x, "coords": coords}, folder / f"s{i}.safetensors")
        rows.append(f"s{i},{'abc'[i % 3]},p{i // 3 * 3 + i % 3}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_digits(tmp_path: Path) -> None:
    settings = SlidesSettings(tuple(METHODS), out=str(tmp_path), **FAST)
    results = run(settings)
    assert Results.read(tmp_path / "results.json") == results
    assert {row.method for row in results.methods} == set(METHODS)
    for row in results.methods:
        assert row.status == "ok", row.error
        assert set(row.scores) == {"auc", "f1", "accuracy", "instance_auc"}
        assert all(score.mean is not None and 0 <= score.mean <= 1 for score in row.scores.values())
        assert (row.steps, row.curves[0].step) == (24, (12, 24))
        assert all(row.costs[cost.name] for cost in results.costs)
    assert (results.data.train, results.data.details["validation"], results.data.test) == (12, 8, 8)
    page = write_report(results, tmp_path).read_text()
    for words in ("What they attend to", "no method was told which they are", "the first", "acmil-mha", "macro F1"):
        assert words in page
    assert page.count("data:image/png") >= 3 * 10 * len(METHODS)
    assert results.best is not None
    output = heed.from_pretrained(tmp_path / results.best.path)(torch.randn(5, 64))
    assert output.logits.shape == (1, 2)  # type: ignore[attr-defined]


def test_a_folder_of_slides(slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = run(SlidesSettings(("abmil", "acmil-ga"), data=str(slides), out=str(out), batch_size=2, **FAST))
    assert all(row.status == "ok" for row in results.methods)
    assert results.methods[0].scores["instance_auc"].mean is None
    assert results.data.details["classes"] == ["a", "b", "c"]
    page = write_report(results, out).read_text()
    assert "where each method’s best trial looks" in page
    assert page.count("data:image/png") == 3 * 2
    again = run(SlidesSettings(("abmil", "acmil-ga"), data=str(slides), out=str(out), batch_size=2, **FAST))
    assert again == results


def test_models_fit_methods_and_data() -> None:
    data = digit_bags()
    settings = SlidesSettings(("stkim",), n_token=4, n_masked_patch=7, mask_drop=0.5)
    stkim, acmil = (build_model(name, settings, data).config for name in ("stkim", "acmil-mha"))
    assert (stkim.n_token, stkim.n_masked_patch, stkim.mask_drop, stkim.dim) == (1, 7, 0.5, 64)
    assert (acmil.arch, acmil.n_token) == ("mha", 4)
    assert [reduced_width(width) for width in (384, 768, 1024, 2048, 100)] == [128, 384, 512, 1024, 64]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ("abmill",)}, "unknown method 'abmill'; did you mean 'abmil'"),
        ({"mask_drop": 2.0}, "drop=2.0"),
        ({"n_masked_patch": -1}, "top=-1"),
        ({"epochs": 0}, "epochs=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"batch_size": 13}, "batch_size=13 is more than the 12 training bags"),
    ],
)
def test_refusals(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(SlidesSettings(**{"methods": ("abmil",), "out": str(tmp_path / "out"), **FAST, **wrong}))


def test_command(tmp_path: Path) -> None:
    args = ["compare", "slides", "--methods", "abmil,stkim", "--out", str(tmp_path), "--epochs", "1", "--seeds", "1"]
    result = CliRunner().invoke(app, [*args, "--threads", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "instance AUC" in result.output
    assert (tmp_path / "report.html").is_file()
    result = CliRunner().invoke(app, ["compare", "slides", "--data", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "nowhere" in result.stderr
