"""The track `language`: all its methods on a little text, its report, going on after a stop, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from heed.cli import app
from heed.compare import LanguageSettings, run
from heed.compare.report import write_report
from heed.compare.results import Results
from heed.compare.tracks.language.learner import TextLearner
from heed.compare.tracks.language.methods import APPLIED, MODELS, TOLD, build_model
from heed.data.text import TextData

FAST: dict[str, Any] = {
    "steps": 4, "seeds": 1, "width": 32, "layers": 2, "heads": 4, "context": 64, "batch_size": 2, "device": "cpu",
    "threads": 1,
}  # fmt: skip
METHODS = (*APPLIED, *MODELS)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heed.compare.measure.TIMED_SECONDS", 0.01)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and " * 60)
    return str(path)


def test_all_methods(text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = run(LanguageSettings(METHODS, data=text, out=str(out), **FAST))
    assert Results.read(out / "results.json") == results
    for row in results.methods:
        assert row.status == "ok", row.error
        assert 2 < (row.scores["bits"].mean or 0) < 12
        assert (row.steps, row.curves[0].step) == (4, (1, 2, 3, 4))
        assert all(row.costs[cost.name] for cost in results.costs)
        seen = json.loads((out / "trials" / f"{row.method}-0" / "positions.json").read_text())
        assert len(seen) == 64
        assert seen[-1] > 0
    bits = [row.scores["bits"].mean for row in results.methods]
    assert bits == sorted(bits), "less is better"
    page = write_report(results, out).read_text()
    for words in ("What context is worth to them", "bits per byte", "softmax", "scored bytes/s", "Take the winner"):
        assert words in page


def test_a_decoder_can_be_taken_away(text: str, tmp_path: Path) -> None:
    results = run(LanguageSettings(("window",), data=text, out=str(tmp_path / "out"), **FAST))
    page = write_report(results, tmp_path / "out").read_text()
    assert "heed.apply(model, Patterned(pattern=Window(left=7, right=7), dense_layers=()))" in page.replace(
        "&#34;", '"'
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "best")
    assert model(torch.randint(256, (1, 9))).logits.shape == (1, 9, 256)


def test_the_same_again_also_after_a_stop(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(name: str) -> LanguageSettings:
        return LanguageSettings(("softmax",), data=text, out=str(tmp_path / name), **FAST)

    whole = run(settings("whole"))
    step = TextLearner.step

    def stop_at_two(self: TextLearner, seed: int, number: int) -> torch.Tensor:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, seed, number)

    monkeypatch.setattr(TextLearner, "step", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        run(settings("parts"))
    monkeypatch.setattr(TextLearner, "step", step)
    parts = run(settings("parts"))
    assert parts.methods[0].scores == whole.methods[0].scores
    assert parts.methods[0].curves == whole.methods[0].curves


@pytest.mark.parametrize("method", METHODS)
def test_it_predicts_what_comes_and_does_not_see_it(method: str) -> None:
    """A byte's loss depends on what comes before it and on itself, and not on what follows."""
    settings = LanguageSettings((method,), **FAST)
    torch.manual_seed(0)
    model = build_model(method, settings).eval()
    ids = torch.randint(256, (2, 65))
    other = ids.clone()
    other[:, 40:] = torch.randint(256, (2, 25))
    with torch.no_grad():
        one, two = model(ids)[0], model(other)[0]
    assert one.shape == (2, 64)
    if method not in TOLD:
        torch.testing.assert_close(one[:, :39], two[:, :39], equal_nan=True, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one[:, 39:], two[:, 39:])
    assert one[:, 32:].isfinite().all(), "the second half of the context is what counts"


def test_every_test_byte_is_scored_once() -> None:
    settings = LanguageSettings(("softmax",), **FAST)
    text = torch.arange(65 + 32 * 5, dtype=torch.uint8)
    learner = TextLearner(settings, build_model("softmax", settings), TextData("", text, text), 1)
    scored = learner.test[:, 1:][:, 32:].flatten()
    assert torch.equal(scored, text[33:])


def test_bad_settings(text: str, tmp_path: Path) -> None:
    for values, words in (
        ({"methods": ("sofmax",)}, "unknown method 'sofmax'.*softmax"),
        ({"context": 8192}, "bytes to learn from, and context=8192 needs more"),
        ({"context": 40}, "context=40: give a multiple of 32"),
        ({"width": 36}, "heads of an even, whole width"),
        ({"epochs": 1}, "epochs and steps are given together"),
        ({"precision": "fp8"}, "unknown precision"),
        ({"precision": "fp16"}, "needs an accelerator"),
    ):
        given = {"methods": ("softmax",), "data": text, "out": str(tmp_path / "bad"), **FAST, **values}
        with pytest.raises(ValueError, match=words):
            run(LanguageSettings(**given))
        assert not list((tmp_path / "bad").glob("*.safetensors"))


def test_the_command(text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]
    done = CliRunner().invoke(
        app, ["compare", "language", "--methods=softmax,strided", "--data", text, "--out", str(out), *options]
    )
    assert done.exit_code == 0, done.output
    assert "bits per byte" in done.output
    assert (out / "report.html").is_file()
    wrong = CliRunner().invoke(app, ["compare", "language", "--methods=softmax", "--data=/nowhere"])
    assert wrong.exit_code == 2
    assert "is no file or folder" in " ".join(wrong.output.split())
