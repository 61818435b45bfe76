"""Reading text from everywhere, and what is said when something is wrong with it."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from heed.data.text import TextData, load_text


def whole(data: TextData) -> tuple[bytes, bytes]:
    return bytes(data.train.tolist()), bytes(data.test.tolist())


def test_the_text_that_comes_with_python() -> None:
    data = load_text()
    assert len(data.train) > 300_000
    assert len(data.train) / len(data.test) == pytest.approx(9, abs=0.01)
    assert b"statement" in whole(data)[0]
    assert data.notes == ("the last 10% of the text are the test part",)
    assert data.fingerprint() == load_text().fingerprint()


def test_a_file_also_gzipped(tmp_path: Path) -> None:
    text = "0123456789äöü".encode() * 10
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text))
    plain, packed = load_text(str(tmp_path / "a.txt")), load_text(str(tmp_path / "b.txt.gz"))
    assert b"".join(whole(plain)) == b"".join(whole(packed)) == text
    assert plain.name == "a.txt"


def test_folders(tmp_path: Path) -> None:
    for name, text in (("sub/one.md", "one"), ("two.txt", "two")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text * 9)
    assert b"".join(whole(load_text(str(tmp_path)))) == b"one" * 9 + b"\n" + b"two" * 9
    (tmp_path / "wiki.train.txt").write_text("learn")
    (tmp_path / "wiki.valid.txt").write_text("test")
    assert whole(load_text(str(tmp_path))) == (b"learn", b"test")


def test_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_dict({"text": [name, "", "more"]}) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert whole(load_text(str(tmp_path / "saved"))) == (b"train\nmore", b"validation\nmore")
    datasets.Dataset.from_dict({"words": ["x"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="columns words; none is text"):
        load_text(str(tmp_path / "x.parquet"))


def test_saving(tmp_path: Path) -> None:
    data = TextData("some", torch.arange(9, dtype=torch.uint8), torch.arange(3, dtype=torch.uint8), ("cut", "short"))
    data.save(tmp_path / "text.safetensors")
    again = TextData.load(tmp_path / "text.safetensors")
    assert (again.name, again.notes, again.fingerprint()) == (data.name, data.notes, data.fingerprint())


def test_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "zeros.bin").write_bytes(bytes(9))
    (tmp_path / "broken.gz").write_bytes(b"nothing gzipped")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name, words in {
        "zeros.bin": "is not text: it has zero bytes",
        "broken.gz": "cannot be read",
        "empty.txt": "too little text: 0 bytes to learn from",
        "folder": "holds no text: none of its files ends in",
    }.items():
        with pytest.raises(ValueError, match=words):
            load_text(str(tmp_path / name))
    with pytest.raises(ValueError, match="is no file or folder"):
        load_text(str(tmp_path / "missing"))
