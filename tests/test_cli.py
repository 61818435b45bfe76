"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import heed.compare
import heed.demos.registry
from heed.catalogue import systems
from heed.cli import app


def _heed(*args: str) -> Any:
    return CliRunner().invoke(app, args)


def test_list_shows_every_system() -> None:
    result = _heed("list")
    assert result.exit_code == 0
    assert all(entry.slug in result.output for entry in systems())
    assert f"{len(systems())} systems" in result.output


def test_list_can_be_narrowed() -> None:
    result = _heed("list", "--room", "layers", "--built")
    assert result.exit_code == 0
    wanted = {entry.slug for entry in systems(room="layers", built=True)}
    assert all(slug in result.output for slug in wanted)
    assert "planned" not in result.output


@pytest.mark.parametrize("name", ["13-fna", "fna", "13"])
def test_show_names_paper_state_classes_and_demo(name: str) -> None:
    result = _heed("show", name)
    assert result.exit_code == 0
    for words in ("2403.04690", "engine", "built", "NeighborhoodAttention2D", "(B, H, W, C)", "heed demo 13-fna"):
        assert words in result.output


def test_show_says_what_is_planned() -> None:
    planned = systems(built=False)
    if planned:
        assert "planned" in _heed("show", planned[0].slug).output


def test_demo_prints_figures_and_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(picture: Path) -> dict[str, int]:
        picture.write_bytes(b"picture")
        return {"tokens": 7}

    monkeypatch.setitem(heed.demos.registry.demos._entries, "13-fna", draw)
    result = _heed("demo", "fna", "--out", str(tmp_path / "pictures"))
    assert result.exit_code == 0
    assert "tokens  7" in result.output
    assert (tmp_path / "pictures" / "13-fna.png").is_file()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["show", "hilow"], "did you mean 'hilo'"),
        (["list", "--room", "visoin"], "did you mean 'vision'"),
        (["report", "nowhere"], "nowhere"),
        (["compare", "classify", "--methods", "softmax,softmaxx"], "did you mean 'softmax'"),
        (["compare", "classify", "--methods", "softmax", "--seeds", "0"], "seeds=0"),
        (["compare", "classify", "--methods", ","], "methods is empty"),
        (["compare", "classify", "--methods", "softmax", "--epochs", "1", "--steps", "2"], "choose one budget"),
        (["compare", "classify", "--methods", "softmax", "--precision", "fp61"], "did you mean 'fp16'"),
        (["compare", "classify", "--methods", "softmax", "--data", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_2(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = _heed(*args)
    assert result.exit_code == 2
    said = [line for line in result.stderr.splitlines() if line.startswith("heed: ")]
    assert len(said) == 1
    assert words in said[0]
    assert "Traceback" not in result.output


def test_debug_shows_the_traceback() -> None:
    result = _heed("--debug", "show", "hilow")
    assert isinstance(result.exception, ValueError)


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(heed.compare, "run", interrupted)
    args = ["compare", "classify", "--methods", "softmax", "--fresh", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["heed", *args])
    result = _heed(*args)
    assert result.exit_code == 130
    assert "goes on from there" in result.stderr
    assert f"heed compare classify --methods softmax --out {tmp_path}\n" in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["compair"], "No such command 'compair'"),
        (["compare", "classify"], "Missing option '--methods'"),
        (["compare", "classify", "--methods", "softmax", "--seeds", "three"], "Invalid value for '--seeds'"),
        (["show", "hilow"], "unknown system 'hilow'; did you mean 'hilo'"),
    ],
)
def test_wrong_arguments_in_a_shell(args: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from heed.cli import app; app()", *args], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
