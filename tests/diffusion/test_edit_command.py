"""`heed edit` and its page: what they hand over, what they refuse, and how the page looks in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from heed.diffusion import cli
from heed.diffusion.app import OPERATIONS, build_page, drawn_plan, serve
from heed.diffusion.designedit import DesignEdit, DesignEditSettings
from heed.diffusion.tiny import tiny_pipeline

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
TINY = ["--model", "tiny", "--steps", "3", "--size", "32", "--device", "cpu"]
BOX = ["--mask", "box:8,8,24,24"]

app = typer.Typer()
app.command("edit")(cli.edit)
app.command("page")(cli.page)


def heed(*args: str) -> Any:
    return CliRunner().invoke(app, args)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(PICTURE).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.mark.parametrize(
    "args",
    [
        [*BOX, "--remove"],
        [*BOX, "--move", "0.2", "-0.1", "--resize", "0.5", "--flip", "both"],
        [*BOX, *BOX, "--swap"],
        ["--zoom-out", "0.5", "0.7"],
    ],
)
def test_edits(args: list[str], picture: Path) -> None:
    out = picture.parent / "new" / "out.png"
    result = heed("edit", str(picture), *args, *TINY, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert Image.open(out).size == (48, 40)
    assert str(out) in result.output


def test_plans_and_kept_trajectories(picture: Path) -> None:
    (picture.parent / "plan.json").write_text('{"background": {"image": "cat.png", "pan": [0.2, 0]}}')
    kept, out = picture.parent / "kept.safetensors", picture.parent / "out.png"
    args = ["edit", "--plan", str(picture.parent / "plan.json"), *TINY, "--trajectory", str(kept), "--out", str(out)]
    assert heed(*args).exit_code == 0
    first, written = out.read_bytes(), kept.read_bytes()
    assert heed(*args).exit_code == 0
    assert out.read_bytes() == first
    assert kept.read_bytes() == written


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "nothing asked for; choose one of remove"),
        ([*BOX, "--remove", "--pan", "0.1", "0"], "remove and pan asked for"),
        (["--remove"], "remove takes one mask or more, 0 given"),
        ([*BOX, "--swap"], "swap takes 2 masks, 1 given"),
        ([*BOX, "--zoom-out", "0.5", "0.5"], "zoom-out takes 0 masks"),
        ([*BOX, "--flip", "lr"], "flip='lr' must be one of"),
        (["--mask", "box:1,2", "--remove"], "is no mask"),
        (["--mask", "nowhere.png", "--remove"], "no file at nowhere.png"),
        ([*BOX, "--remove", "--dtype", "float8"], "unknown dtype 'float8'"),
    ],
)
def test_refusals(args: list[str], words: str, picture: Path) -> None:
    result = heed("edit", str(picture), *args, *TINY, "--out", str(picture.parent / "out.png"))
    assert isinstance(result.exception, ValueError | OSError)
    assert words in str(result.exception)


def drawing(*boxes: tuple[int, int]) -> dict[str, Any]:
    """As gr.ImageEditor gives it: each (start, end) is a square drawn on a layer of its own."""
    layers = [np.zeros((40, 48, 4), np.uint8) for _ in (*boxes, None)]
    for layer, (start, end) in zip(layers, boxes, strict=False):
        layer[start:end, start:end] = 200
    background = np.concatenate([PICTURE, np.full((40, 48, 1), 255, np.uint8)], 2)
    return {"background": background, "layers": layers, "composite": background}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_drawings_become_plans(operation: str) -> None:
    boxes = {"Swap two": ((4, 9), (20, 30)), "Zoom out": (), "Pan": ()}.get(operation, ((4, 9),))
    before, plan = drawn_plan(drawing(*boxes), operation, 0.2, 0.1, 0.5, "both", 0.6)
    np.testing.assert_array_equal(before, PICTURE)
    moved = {"Move, resize, flip": 1, "Copy": 1, "Swap two": 2}.get(operation, 0)
    assert len(plan.layers) == moved
    if operation in ("Move, resize, flip", "Copy"):
        layer = plan.layers[0]
        assert (layer.dx, layer.dy, layer.scale, layer.flip) == (0.2, 0.1, 0.5, "both")
        assert np.asarray(layer.mask).sum() == 25


@pytest.mark.parametrize(
    ("drawn", "operation", "words"),
    [
        (None, "Remove", "no picture yet"),
        (drawing(), "Remove", "draw on what is to be removed"),
        (drawing((1, 5), (7, 9)), "Copy", "2 layers have something on them"),
        (drawing((1, 5)), "Swap two", "two objects on two layers; 1 have"),
    ],
)
def test_what_the_page_asks_for(drawn: Any, operation: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        drawn_plan(drawn, operation)


def tiny_page() -> Any:
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return build_page(DesignEdit(pipeline, DesignEditSettings(steps=3)), tiny=True, picture=PICTURE)


def test_the_button_edits_and_keeps_the_inversion() -> None:
    gradio = pytest.importorskip("gradio")
    run = next(block.fn for block in tiny_page().fns.values() if block.name == "run")
    controls = ("Move, resize, flip", 0.2, 0.1, 0.5, "none", 0.6, "")
    (before, after), kept = run(drawing((4, 20)), *controls, None)
    assert before.shape == after.shape == PICTURE.shape
    (_, again), kept = run(drawing((4, 20)), *controls, kept)
    np.testing.assert_array_equal(again, after)
    assert len(kept.keys) == 1
    with pytest.raises(gradio.Error, match="no picture yet"):
        run(None, *controls, None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on the PATH to open the page with")
def test_the_page_opens_in_a_browser(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    page, shot = tiny_page(), tmp_path / "page.png"
    address = serve(page, 0, wait=False)
    try:
        flags = ["--no-sandbox", "--headless", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=6000"]
        flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1100", f"--screenshot={shot}"]
        done = subprocess.run([CHROMIUM, *flags, "--dump-dom", address], capture_output=True, text=True, timeout=90)
    finally:
        page.close()
    assert done.returncode == 0, done.stderr
    assert address.startswith("http://127.0.0.1:")
    assert "Random tiny network" in done.stdout
    assert all(operation in done.stdout for operation in OPERATIONS)
    loaded = re.findall(r'(?:src|href)="(https?://[^"]+)"', done.stdout)
    assert all(link.startswith(address) for link in loaded), "something is loaded from elsewhere"
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert all(third.std() > 5 for third in np.array_split(pixels, 3))
