"""Weights: what is written can be read, what is broken or hostile is refused with its name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import heed
from heed.checkpoint import load_weights, read_weights, write_atomically, write_weights


class _Bomb:
    """Unpickling this would run a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def test_round_trip(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    write_weights(layer, tmp_path / "deep" / "w.safetensors")
    other = nn.Linear(3, 2)
    load_weights(other, read_weights(tmp_path / "deep" / "w.safetensors"), "file")
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("nest", [[], ["model"], ["state_dict"], ["state_dict", "model"]])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_authors_layouts(tmp_path: Path, nest: list[str], prefix: str) -> None:
    content: dict = {f"{prefix}{key}": value for key, value in nn.Linear(3, 2).state_dict().items()}
    for key in nest:
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    assert sorted(read_weights(tmp_path / "w.pth")) == ["bias", "weight"]


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "ran"
    torch.save({"model": _Bomb(mark)}, tmp_path / name)
    with pytest.raises(ValueError, match="is refused: it holds more than tensors"):
        read_weights(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps(_Bomb(mark)))
    with pytest.raises(ValueError, match=name):
        read_weights(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_named(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(nn.Linear(30, 20).state_dict(), path)
    else:
        write_weights(nn.Linear(30, 20), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=f"{name} is not a readable .* \\(truncated\\?\\)"):
        read_weights(path)


def test_what_holds_no_weights_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds no weights; its keys are \\['epoch'\\]"):
        read_weights(tmp_path / "w.pth")
    torch.save([torch.ones(2)], tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds a list"):
        read_weights(tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        read_weights(tmp_path / "none.pth")


def test_weights_that_do_not_fit_name_every_kind_of_misfit() -> None:
    weights = {"weight": torch.ones(2, 4), "gain": torch.ones(1)}
    with pytest.raises(ValueError, match=r"missing: bias; not known to the model: gain; wrong shapes: weight \(2, 4\)"):
        load_weights(nn.Linear(3, 2), weights, "file")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_saved_models_come_back_by_their_name(tmp_path: Path) -> None:
    model = heed.create_model("vit_micro", attention="neighborhood", num_classes=3).eval()
    model.save_pretrained(tmp_path)
    again = heed.from_pretrained(tmp_path)
    x = torch.randn(2, 1, 8, 8)
    assert type(again) is type(model)
    assert again.config == model.config
    assert torch.equal(again(x), model(x))
    assert torch.equal(type(model).from_pretrained(tmp_path)(x), model(x))


def test_a_damaged_model_folder_is_named(tmp_path: Path) -> None:
    model = heed.create_model("vit_micro")
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable"):
        heed.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "heed_vit_')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        heed.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        heed.from_pretrained(tmp_path)


def test_names_that_do_not_exist_get_a_suggestion() -> None:
    with pytest.raises(ValueError, match="unknown model 'vit_tinny'; did you mean 'vit_tiny'"):
        heed.create_model("vit_tinny")
    with pytest.raises(ValueError, match="unknown setting of vit_tiny 'atention'; did you mean 'attention'"):
        heed.create_model("vit_tiny", atention="hilo")
    with pytest.raises(ValueError, match="unknown attention layer 'neigborhood'; did you mean 'neighborhood'"):
        heed.create_layer("neigborhood", 32, 4, (8, 8))
    with pytest.raises(ValueError, match="unknown system 'hilo2'"):
        heed.catalogue.system("hilo2")
