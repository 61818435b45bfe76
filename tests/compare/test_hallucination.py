"""The track `hallucination`: data, scores, and whole runs with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from heed.cli import app
from heed.compare import HallucinationSettings, Results, run
from heed.compare.report import write_report
from heed.compare.tracks.hallucination.questions import Item, Questions, load_questions
from heed.compare.tracks.hallucination.scores import judge, mentioned, says_yes
from heed.multimodal.scenes import draw_scene
from heed.multimodal.tiny import tiny_model, tiny_processor, train_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images and POPE-style questions."""
    path = tmp_path_factory.mktemp("pope")
    model, processor = tiny_model(0), tiny_processor()
    train_tiny(model, processor, steps=2)
    model.save_pretrained(path / "model")
    processor.save_pretrained(path / "model")
    lines: list[dict[str, Any]] = [{"synonyms": {"red circle": ["ball"]}}]
    for number in range(3):
        scene = draw_scene(np.random.default_rng(number))
        scene.image.save(path / f"{number}.png")
        for label, name in (("yes", scene.names[0]), ("no", "purple hexagon")):
            lines.append({"image": f"{number}.png", "text": f"Is there a {name} in the image?", "label": label})
        lines.append({"image": f"{number}.png", "objects": scene.names})
    (path / "pope.json").write_text("\n".join(map(json.dumps, lines)))
    return path


def settings_for(folder: Path, out: Path, **changes: Any) -> HallucinationSettings:
    given = {
        "model": str(folder / "model"), "data": str(folder / "pope.json"), "out": str(out), "device": "cpu", "threads": 1,
        "max_new_tokens": 4, "batch_size": 4, "methods": ("plain", "var"),
    }  # fmt: skip
    return HallucinationSettings(**{**given, **changes})


def test_a_run_on_files(folder: Path, tmp_path: Path) -> None:
    settings = settings_for(folder, tmp_path)
    results = run(settings)
    assert [row.status for row in results.methods] == ["ok", "ok"], [row.error for row in results.methods]
    assert (results.data.test, results.data.details) == (6, {"yes": 3, "descriptions": 3, "images": 3})
    for row in results.methods:
        scores = {name: score.mean for name, score in row.scores.items()}
        assert set(scores) == {"accuracy", "precision", "recall", "f1", "yes_ratio", "chair_i", "chair_s"}
        assert all(value is not None and 0 <= value <= 1 for value in scores.values())
        assert row.costs["forwards"] == 1.0  # one decoder forward per step, steered or not
    assert Results.read(tmp_path / "results.json") == results
    assert run(settings) == results
    page = write_report(results, tmp_path).read_text()
    assert "Where they differ" in page
    assert "purple hexagon" in page


def test_the_tiny_model_is_trained_once_for_all_methods(tmp_path: Path) -> None:
    settings = HallucinationSettings(
        methods=("plain", "var"),
        out=str(tmp_path),
        tiny_steps=3,
        questions=4,
        max_new_tokens=3,
        threads=1,
        device="cpu",
    )
    results = run(settings)
    assert [row.status for row in results.methods] == ["ok", "ok"], [row.error for row in results.methods]
    assert results.data.test == 4
    model = tmp_path / "trials" / "tiny-0" / "model.safetensors"
    written = model.stat().st_mtime_ns
    (tmp_path / "trials" / "var-0" / "result.json").unlink()
    assert run(settings).methods == results.methods or model.stat().st_mtime_ns == written
    assert model.stat().st_mtime_ns == written


def test_the_command(folder: Path, tmp_path: Path) -> None:
    args = ["compare", "hallucination", "--methods", "plain", "--model", str(folder / "model"), "--questions", "2"]
    args += ["--data", str(folder / "pope.json"), "--out", str(tmp_path), "--max-new-tokens", "2", "--device", "cpu"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "report: " in result.output


def test_scenes_are_the_same_every_time_and_balanced() -> None:
    settings = HallucinationSettings(questions=100)
    first, again = load_questions(settings), load_questions(settings)
    assert first.fingerprint() == again.fingerprint()
    assert sum(item.label == "yes" for item in first.asked) == 50
    assert len(first.described) == 50


def test_what_is_wrong_with_a_file_is_said(folder: Path, tmp_path: Path) -> None:
    for text, message in [
        ("{", "neither JSON nor one JSON object per line"),
        ("[3]", "must hold objects"),
        ('[{"text": "?"}]', "entry 1 names no image"),
        ('[{"image": "0.png"}]', "neither a label"),
        ('[{"image": "0.png", "label": "maybe", "text": "?"}]', "label='maybe' must be 'yes' or 'no'"),
        ('[{"image": "7.png", "label": "no", "text": "?"}]', "there is no image"),
        ('[{"image": "0.png", "objects": ["cat"]}]', "asks no question with a label"),
    ]:
        file = tmp_path / "data.json"
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_questions(settings_for(folder, tmp_path, data=str(file), images=str(folder)))
    with pytest.raises(ValueError, match="there is no such file"):
        load_questions(settings_for(folder, tmp_path, data="nowhere.json"))


def test_settings_that_make_no_sense(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the tiny model knows drawn scenes only"):
        HallucinationSettings(data="pope.json")
    with pytest.raises(ValueError, match="greedy answers of a given model are the same"):
        settings_for(folder, tmp_path, seeds=2)
    with pytest.raises(ValueError, match="temperature=-1"):
        settings_for(folder, tmp_path, temperature=-1.0)
    with pytest.raises(ValueError, match="unknown method 'vra'; did you mean 'var'"):
        run(settings_for(folder, tmp_path / "x", methods=("vra",)))


@pytest.mark.parametrize(
    ("answer", "yes"),
    [("Yes, there is.", True), ("No.", False), ("There is not. Yes", False), ("yes", True), ("A dog. No cat.", True)],
)
def test_answers_are_read_as_pope_reads_them(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes


def test_scores_by_hand() -> None:
    items = [Item("a", "?", label) for label in ("yes", "yes", "no", "no")]
    items += [Item("a", "Describe", objects=("cat",)), Item("b", "Describe", objects=("dog", "bus"))]
    questions = Questions("made", tuple(items), {"cat": ("kitten",)})
    found = judge(questions, ["yes", "no", "yes", "no", "Two kittens and a bus.", "Dogs near buses; a category."])
    wanted = {
        "accuracy": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "yes_ratio": 0.5,
        "chair_i": 0.25,
        "chair_s": 0.5,
    }
    assert found == pytest.approx(wanted)
    assert mentioned("the dogs", ["dog", "do"], {}) == {"dog"}
    only = Questions("made", tuple(items[:4]))
    assert set(judge(only, ["yes"] * 4)) == {"accuracy", "precision", "recall", "f1", "yes_ratio"}
