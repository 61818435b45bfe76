"""The report and the table of a comparison, from results made by hand."""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

import heed
from heed.compare import ClassifySettings
from heed.compare.report import write_report
from heed.compare.results import Best, Curve, DataSummary, Machine, MethodResult, Results, Score
from heed.compare.table import headline, print_results, quantity
from heed.compare.tracks.classify.track import TRACK

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _row(name: str, mean: float, rank: int, tied: tuple[str, ...] = ()) -> MethodResult:
    steps = tuple(range(12, 121, 12))
    loss = tuple(2.0 / step**0.5 for step in steps)
    curves = tuple(
        Curve(seed, steps, {"loss": loss, "accuracy": tuple(mean - 2 / (step + seed) for step in steps)})
        for seed in range(3)
    )
    scores = {"accuracy": Score(mean, 0.004, (mean - 0.004, mean, mean + 0.004))}
    costs = {"parameters": 143_210, "flops": 2_400_000, "train": 4100.0, "infer": 9900.0, "memory": 48 << 20}
    return MethodResult(name, "ok", scores, None, rank, tied, 120, costs, curves)


NONE = {"accuracy": Score(None, None, (None,) * 3)}
FAILED = MethodResult("halo", "failed", NONE, "ValueError: pad the map by <2> & try again")
WINNER = _row("neighborhood", 0.97, 1)
TIED = (_row("neighborhood", 0.97, 1, ("hilo",)), _row("hilo", 0.968, 1, ("neighborhood",)), _row("softmax", 0.95, 3))


def _results(*rows: MethodResult) -> Results:
    settings = ClassifySettings(methods=tuple(row.method for row in rows))
    machine = Machine("A processor", 4, 2, "cpu", "2.11.0", "0.1.0", "3.11.7")
    details = {"classes": list("0123456789"), "image": [1, 8, 8]}
    data = DataSummary("digits", 1437, 360, "images", details, ("a fifth was set apart",))
    best = Best(rows[0].method, 2, "best") if rows[0].status == "ok" else None
    return Results("classify", settings.to_json(), machine, data, TRACK.metrics, TRACK.costs, rows, best)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with two trained models and the test images."""
    torch.manual_seed(0)
    for method in ("neighborhood", "softmax"):
        model = heed.create_model("vit_micro", attention=method, patch_size=2, depth=1)
        model.save_pretrained(tmp_path / "trials" / f"{method}-2" / "model")
    save_file({"images": torch.randn(6, 1, 8, 8), "labels": torch.arange(6)}, tmp_path / "samples.safetensors")
    return tmp_path


def test_report_says_everything(folder: Path) -> None:
    path = write_report(_results(*TIED, FAILED), folder)
    assert path == folder / "report.html"
    page = path.read_text()
    assert "neighborhood and hilo lead" in page
    assert "97.0 ± 0.4 %" in page
    assert "failed: ValueError: pad the map by &lt;2&gt; &amp; try again" in page
    assert "halo" in page
    assert "A processor" in page
    assert "a fifth was set apart" in page
    assert "heed.from_pretrained(" in page
    # One strip per finished method, three trade-offs, two learning curves for each method that began.
    assert page.count("<svg") == 3 + 3 + 2 * 3
    # The six images, and two maps of each for the two methods whose models are there.
    assert page.count("data:image/png") == 6 + 2 * 6 * 2


def test_report_needs_no_network_and_no_script(folder: Path) -> None:
    page = write_report(_results(*TIED, FAILED), folder).read_text()
    assert not re.findall(r'https?://|<script|@import|(?:src|href)="(?!data:|#)|url\((?!#)', page)
    charts = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(set.union(*charts)) == sum(map(len, charts)), "ids of different charts must not collide"
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set.union(*charts)


def test_report_can_be_rebuilt_from_the_file(tmp_path: Path) -> None:
    results = _results(*TIED, FAILED)
    results.write(tmp_path / "results.json")
    first = write_report(results, tmp_path).read_text()
    assert write_report(Results.read(tmp_path / "results.json"), tmp_path).read_text() == first
    assert "What they attend to" not in first, "there are no models to look at"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((WINNER, _row("softmax", 0.9, 2), FAILED), "neighborhood wins on digits: it reaches accuracy 97.0 %"),
        (TIED, "It is a tie at the top on digits: neighborhood and hilo lead"),
        (TIED[:2], "It is a tie on digits: neighborhood and hilo differ"),
        ((WINNER, FAILED), "nothing to compare"),
        ((FAILED,), "No method finished on digits"),
    ],
)
def test_headline(rows: tuple[MethodResult, ...], words: str, tmp_path: Path) -> None:
    results = _results(*rows)
    assert words in headline(results)
    assert words in write_report(results, tmp_path).read_text().replace("\u00a0", " ")


def test_one_seed_and_missing_costs_are_shown_as_unknown(tmp_path: Path) -> None:
    costs = {**WINNER.costs, "flops": None, "memory": None}
    row = dataclasses.replace(WINNER, scores={"accuracy": Score(0.97, None, (0.97,))}, curves=(), costs=costs)
    page = write_report(_results(row), tmp_path).read_text()
    assert "97.0 %" in page
    assert "±" not in page.split("<tbody>")[1]
    assert '<td data-name="FLOPs">–</td>' in page


def test_table_ranks_ties_and_explains_failures() -> None:
    console = Console(file=io.StringIO(), width=100)
    print_results(_results(*TIED, FAILED), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"1 +neighborhood +97.0 ± 0.4 % +143 k +2.40 M +4.10 k +9.90 k +50.3 MB", text)
    assert "tied: neighborhood = hilo\n" in text
    assert "halo failed: ValueError: pad the map" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (0.5, "0.50"),
        (999, "999"),
        (999.7, "1.00 k"),
        (12_345, "12.3 k"),
        (2e13, "20.0 T"),
        (None, "–"),
    ],
)
def test_quantities(value: float | None, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on the PATH to open the report with")
@pytest.mark.parametrize("width", [1280, 400])
def test_report_opens_in_a_browser(folder: Path, width: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    page = write_report(_results(*TIED, FAILED), folder)
    picture, profile = folder / "page.png", tmp_path_factory.mktemp("profile")
    flags = ["--no-sandbox", "--headless", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]
    flags += [f"--user-data-dir={profile}", f"--window-size={width},2400", f"--screenshot={picture}"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape == (2400, width)
    # Something is drawn in every quarter of the page, not on the top alone.
    assert all(quarter.std() > 5 for quarter in np.array_split(pixels, 4))
