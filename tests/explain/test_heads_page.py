"""The page on heads and the command that writes it, for models of three libraries and folders of pictures."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

import heed
from heed.cli import app
from heed.explain.heads import PatternOptions, analyse
from heed.explain.heads.page import write_heads_page
from heed.explain.models import load_model, read_pictures

TIMM = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 2}
HF = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two class folders with three pictures each, of several sizes."""
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            pixels = draw.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture(params=["heed", "timm", "transformers"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A saved model."""
    torch.manual_seed(0)
    path = tmp_path / f"saved-{request.param}"
    if request.param == "heed":
        heed.create_model("vit_micro", img_size=16, patch_size=4, in_chans=3, num_classes=2).save_pretrained(path)
    elif request.param == "timm":
        from timm.models import save_for_hf

        model = timm.create_model("vit_tiny_patch16_224", **TIMM)
        settings = {name: value for name, value in TIMM.items() if name != "num_classes"}
        save_for_hf(model, path, model_args=settings)
    else:
        config = transformers.ViTConfig(**HF, id2label={0: "Dog", 1: "Cat"})
        transformers.ViTForImageClassification(config).save_pretrained(path)
        transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


def _page(*names: str) -> str:
    reports = []
    for name in names:
        torch.manual_seed(len(name))
        model = timm.create_model("vit_tiny_patch16_224", **TIMM)
        options = PatternOptions(maps_per_head=2, clusters=3, epochs=1)
        reports.append(analyse(model, torch.randn(3, 3, 16, 16), name=name, patterns=options, random_curves=1))
    path = Path(names[0]).parent / "heads.html"
    return write_heads_page(reports, path).read_text()


def test_page_needs_no_network_and_its_charts_do_not_collide(tmp_path: Path) -> None:
    page = _page(str(tmp_path / "one"), str(tmp_path / "two"))
    assert not re.findall(r'https?://|<script|@import|(?:src|href)="(?!data:|#)|url\((?!#)', page)
    charts = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(charts) == 2 * 5, "pruning, shares, distance, entropy, plane, for each model"
    assert len(set.union(*charts)) == sum(map(len, charts))
    # Per model six heads, three prototypes, three images and four heads in each of them.
    assert page.count("data:image/png") == 2 * (6 + 3 + 3 + 4 * 3)
    assert "Side by side" in page
    assert "prefers-color-scheme: dark" in page


def test_page_names_what_matters(tmp_path: Path) -> None:
    page = _page(str(tmp_path / "a<b>"))
    assert re.search(r"Head \d of layer \d matters most in [^<]*a&lt;b&gt;", page)
    assert "the model’s own predictions stand for the true classes" in page
    assert "Side by side" not in page


def test_command_for_saved_models(folder: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["explain", str(folder), str(pictures), "--out", str(out), "--clusters", "2"])
    assert result.exit_code == 0, result.output
    assert f"report: {out / 'heads.html'}" in result.output
    page = (out / "heads.html").read_text()
    assert "6, with labels" in page
    with (out / "heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {folder.name}
    assert (out / f"{folder.name}.json").is_file()


def test_classes_by_name_and_by_number(folder: Path, pictures: Path) -> None:
    loaded = load_model(str(folder))
    found = read_pictures(pictures, loaded)
    by_name = folder.name == "saved-transformers"  # which says that dog is class 0
    assert found.labels is not None
    assert found.labels.tolist() == ([1, 1, 1, 0, 0, 0] if by_name else [0, 0, 0, 1, 1, 1])
    assert found.images.shape == (6, 3, 16, 16)
    assert read_pictures(pictures, loaded, 2).labels.tolist() == ([1, 0] if by_name else [0, 1])  # type: ignore[union-attr]
    (pictures / "fish").mkdir()
    Image.new("L", (9, 9)).save(pictures / "fish" / "f.png")
    found = read_pictures(pictures, loaded)
    assert found.labels is None
    assert "its own predictions stand for the labels" in found.notes[0]


def test_models_by_name(pictures: Path) -> None:
    assert load_model("vit_micro").model.num_classes == 10
    named = load_model("vit_tiny_patch16_224", untrained=True)
    assert read_pictures(pictures, named, 1).images.shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["vit_tiny_patch16_225", "pictures"], "did you mean"),
        (["vit_micro", "nowhere"], "there is no such folder"),
        (["vit_micro", "empty"], "holds no pictures"),
        (["vit_micro", "torn"], "cannot be read as a picture"),
        (["empty", "pictures"], "holds no config.json"),
        (["vit_micro", "pictures", "--metrics", "prop"], "did you mean 'prob'"),
        (["vit_micro", "pictures", "--projection", "umap"], "known: pca, tsne"),
        (["vit_micro", "pictures", "--against", "vit_micro", "--no-curves"], "name of its own"),
        (["halonet50ts", "pictures", "--untrained"], "has no attention layers that heed can reach"),
    ],
)
def test_wrong_values_are_one_line(
    args: list[str], words: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "torn"):
        (tmp_path / name).mkdir()
    (tmp_path / "torn" / "a.png").write_bytes((pictures / "cat" / "0.png").read_bytes()[:90])
    result = CliRunner().invoke(app, ["explain", *args])
    assert result.exit_code == 2, result.output
    said = [line for line in result.stderr.splitlines() if line.startswith("heed: ")]
    assert len(said) == 1
    assert words in said[0]
