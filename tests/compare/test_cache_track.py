"""The track `cache`: all its methods on a tiny model, its report, models of one's own, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from heed.cli import app
from heed.compare import CacheSettings, run
from heed.compare.report import write_report
from heed.compare.results import Results
from heed.compare.tracks.cache.methods import FULL, METHODS
from heed.compare.tracks.cache.scores import continued
from heed.hosts.saving import save_whole
from heed.language.tiny import tiny_model, tiny_tokenizer

FAST: dict[str, Any] = {
    "prompt": 224, "following": 4, "texts": 3, "keys": 3, "batch_size": 2, "device": "cpu", "threads": 1,
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 150)
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    save_whole(tmp_path / "model", tiny_model(), tiny_tokenizer())
    return str(tmp_path / "model")


def test_all_methods(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heed.compare.tracks.cache.methods._GATE_STEPS", 3)
    out = tmp_path / "out"
    results = run(CacheSettings(tuple(METHODS), data=text, out=str(out), tiny_steps=2, **FAST))
    assert Results.read(out / "results.json") == results
    rows = {row.method: row for row in results.methods}
    full = rows[FULL]
    assert full.scores["change"].mean == 0
    for row in results.methods:
        assert row.status == "ok", row.error
        perplexity, change = (row.scores[name].mean for name in ("perplexity", "change"))
        assert perplexity == pytest.approx((full.scores["perplexity"].mean or 0) * (1 + (change or 0)))
        assert all(row.costs[cost.name] for cost in results.costs)
        found = json.loads((out / "trials" / f"{row.method}-0" / "found.json").read_text())
        assert [depth for depth, _ in found] == [0.0, 0.5, 1.0]
    assert full.costs["bytes"] == 2 * 2 * 2 * 32 * 4  # layers, keys and values, heads, width, float32
    page = write_report(results, out).read_text()
    for words in ("Where they find what they were told", "cache bytes per token", "Up is better for found, down"):
        assert words in page


def test_a_model_of_ones_own(text: str, model: str, tmp_path: Path) -> None:
    options = {"data": text, "model": model, **FAST}
    results = run(CacheSettings((FULL,), out=str(tmp_path / "out"), **options))
    assert results.methods[0].status == "ok", results.methods[0].error
    assert not (tmp_path / "out" / "trials" / "tiny-0").exists()
    again = run(CacheSettings((FULL,), out=str(tmp_path / "again"), **options))
    assert again.methods[0].scores == results.methods[0].scores


def test_perplexity_is_that_of_one_pass_over_the_text() -> None:
    from transformers import DynamicCache

    model = tiny_model().eval()
    texts = torch.randint(3, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    done: list[int] = []
    found = continued(model, texts, 12, DynamicCache, 2, done.append)
    with torch.no_grad():
        logits = model(texts).logits[:, 11:-1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), texts[:, 12:])
    assert found.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    assert done == [2, 3]
    assert found.bytes == 2 * 2 * 2 * 32 * 4


def test_bad_settings(text: str, model: str, tmp_path: Path) -> None:
    for values, words in (
        ({"methods": ("ful",)}, "unknown method 'ful'.*full"),
        ({"prompt": 0}, "prompt=0: give a whole number"),
        ({"data": "/nowhere"}, "is no file or folder"),
        ({"model": "/nowhere"}, "model='/nowhere' is no folder"),
    ):
        with pytest.raises(ValueError, match=words):
            run(CacheSettings(**{"methods": (FULL,), "data": text, "out": str(tmp_path / "bad"), **FAST, **values}))
    for number, (values, words) in enumerate(
        (
            ({"prompt": 4096}, "the model takes 4096"),
            ({"prompt": 2000}, "the test text has .* tokens"),
            ({"prompt": 50}, "length=50 has no room"),
            ({"model": str(tmp_path)}, "cannot be loaded as a language model"),
            ({"dtype": "int3"}, "unknown dtype"),
        )
    ):
        given = {"methods": (FULL,), "data": text, "model": model, "out": str(tmp_path / f"{number}"), **FAST, **values}
        row = run(CacheSettings(**given)).methods[0]
        assert row.status == "failed"
        assert re.search(words, row.error or ""), row.error


def test_the_command(text: str, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]
    done = CliRunner().invoke(
        app,
        ["compare", "cache", "--methods=full,zipcache", "--text", text, "--model", model, "--out", str(out), *options],
    )
    assert done.exit_code == 0, done.output
    assert "found" in done.output
    assert (out / "report.html").is_file()
