"""Bags from folders of feature files: every format, splits without leakage, and what is said when something is wrong."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from heed.data.bag_files import Instances, read_instances, read_shape
from heed.data.bags import SPLITS, Bag, BagData, pad_bags, split_by_patient
from heed.data.slides import digit_bags, load_bags

FEATURES, COORDS = torch.arange(12.0).view(4, 3), torch.arange(8).view(4, 2) * 256


def write(path: Path, features: Tensor = FEATURES, coords: Tensor | None = None) -> Path:
    parts = {"features": features} | ({} if coords is None else {"coords": coords})
    if path.suffix == ".pt":
        torch.save(features if coords is None else parts, path)
    elif path.suffix == ".npy":
        np.save(path, features.numpy())
    elif path.suffix == ".safetensors":
        save_file(parts, path)
    else:
        with h5py.File(path, "w") as file:
            for name, value in parts.items():
                file[name] = value.numpy()
    return path


def write_table(folder: Path, rows: Sequence[Sequence[str]], columns: Sequence[str] = ("slide", "label")) -> Path:
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve slides of two classes in all four formats."""
    for i in range(12):
        write(tmp_path / f"s{i}{('.pt', '.npy', '.h5', '.safetensors')[i % 4]}", torch.randn(3 + i, 5))
    return write_table(tmp_path, [(f"s{i}", "tumour" if i % 2 else "normal") for i in range(12)])


@pytest.mark.parametrize("suffix", [".pt", ".h5", ".safetensors", ".npy"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    coords = None if suffix == ".npy" else COORDS
    path = write(tmp_path / f"slide{suffix}", FEATURES, coords)
    assert read_shape(path) == (4, 3)
    features, places, labels = read_instances(path)
    assert torch.equal(features, FEATURES)
    assert labels is None
    assert places is None if coords is None else torch.equal(places, coords)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"slide\.\w+ is not a readable"):
        read_instances(path)


def test_other_names_and_shapes(tmp_path: Path) -> None:
    torch.save({"feats": FEATURES[None].half(), "instance_labels": torch.tensor([0, 1, 0, 0])}, tmp_path / "a.pt")
    found = read_instances(tmp_path / "a.pt")
    assert torch.equal(found.features, FEATURES)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 0, 0]
    save_file({"whatever": FEATURES}, tmp_path / "b.safetensors")
    assert read_shape(tmp_path / "b.safetensors") == (4, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"features": FEATURES[0]}, r"features \(3,\); \(instances, width\) is needed"),
        ({"features": FEATURES[:0]}, "holds an empty bag"),
        ({"a": FEATURES, "b": FEATURES}, "holds a, b; name its features"),
        ({"features": FEATURES, "coords": COORDS[:2]}, r"coords \(2, 2\) does not belong to 4 instances"),
        ({"features": FEATURES / 0}, "the features of instance 0 are not finite"),
    ],
)
def test_wrong_content_is_named(tmp_path: Path, content: dict[str, Tensor], message: str) -> None:
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=r"wrong\.pt.*" + message):
        read_instances(tmp_path / "wrong.pt")


class Bomb:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('unpickled')",))


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save({"features": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb\.pt is refused"):
        read_instances(tmp_path / "bomb.pt")
    np.save(tmp_path / "bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="of Python objects"):
        read_instances(tmp_path / "bomb.npy")


def test_a_folder(folder: Path, tmp_path: Path) -> None:
    data = load_bags(str(folder))
    assert (data.classes, data.width, len(data.bags)) == (("normal", "tumour"), 5, 12)
    assert "split into train, val and test" in data.notes[0]
    for split in SPLITS:
        assert {bag.label for bag in data.part(split)} == {0, 1}
    before = data.fingerprint()
    again = BagData.load(_saved(data, tmp_path / "elsewhere" / "data.safetensors"))
    assert again.fingerprint() == before == load_bags(str(folder)).fingerprint()
    assert [bag.source for bag in again.bags] == [bag.source for bag in data.bags]
    write(folder / "s0.pt", torch.randn(3, 5))
    assert load_bags(str(folder)).fingerprint() != before


def test_a_table_with_patients_and_splits(folder: Path) -> None:
    rows = [(f"s{i}{'.pt' if i % 4 == 0 else ''}", i % 2, f"p{i // 2}", ("train", "Validation", "test")[i // 2 % 3])
            for i in range(12)]  # fmt: skip
    write_table(folder, [tuple(map(str, row)) for row in rows], ("slide", "label", "patient", "split"))
    data = load_bags(str(folder))
    assert [len(data.part(split)) for split in SPLITS] == [4, 4, 4]
    assert data.classes == ("0", "1")
    write(folder / "extra.npy")
    assert "1 file(s) without a row in labels.csv were left out: extra" in load_bags(str(folder)).notes[0]


def test_validation_is_set_apart_by_patient(folder: Path) -> None:
    rows = [(f"s{i}", str(i % 2), f"p{i}", "test" if i > 9 else "train") for i in range(12)]
    write_table(folder, rows, ("slide", "label", "patient", "split"))
    data = load_bags(str(folder))
    assert [len(data.part(split)) for split in SPLITS] == [8, 2, 2]
    assert "set apart for validation" in data.notes[0]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("s0", "a"), ("s0", "b")], ("slide", "label"), "line 3: slide 's0' is there twice"),
        ([("s0", "a"), ("lost", "b")], ("slide", "label"), "names the slide 'lost', and .* has no"),
        ([("s0", "")], ("slide", "label"), "line 2: slide 's0' with label ''"),
        ([("s0", "a")], ("name", "label"), "columns name, label; slide must be among them"),
        ([], ("slide", "label"), "holds no slides"),
        ([("s0", "a"), ("s1", "b")], ("slide", "label"), r"class 0 has 1 patient\(s\); at least 3"),
        ([("s0", "a", "trian")], ("slide", "label", "split"), "line 2: split 'trian'; use train, val, test"),
        (
            [("s0", "a", "train"), ("s1", "b", "")],
            ("slide", "label", "split"),
            "slide 's1' has no split while others do",
        ),
        (
            [("s0", "a", "val"), ("s1", "b", "test"), ("s2", "a", "train")],
            ("slide", "label", "split"),
            "split 'train' has no bag of class b; move one there",
        ),
        (
            [("s0", "a", "p", "train"), ("s1", "b", "p", "test"), ("s2", "a", "q", "val")],
            ("slide", "label", "patient", "split"),
            "patient 'p' is in two splits, s0 in train and s1 in test",
        ),
        ([(f"s{i}", "a") for i in range(4)], ("slide", "label"), r"has 1 class\(es\) of bags"),
    ],
)
def test_wrong_tables_are_named(
    folder: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...], message: str
) -> None:
    write_table(folder, rows, columns)
    with pytest.raises(ValueError, match=message):
        load_bags(str(folder))


def test_wrong_folders_are_named(folder: Path) -> None:
    write(folder / "s0.h5")
    with pytest.raises(ValueError, match=r"slide 's0' has 2 files: s0\.h5, s0\.pt; keep one"):
        load_bags(str(folder))
    (folder / "s0.h5").unlink()
    write(folder / "s3.safetensors", torch.zeros(4, 7))
    with pytest.raises(ValueError, match=r"s3\.safetensors has features of width 7, s0\.pt of 5"):
        load_bags(str(folder))
    write(folder / "s3.safetensors", torch.zeros(0, 5))
    with pytest.raises(ValueError, match=r"s3\.safetensors holds an empty bag"):
        load_bags(str(folder))
    (folder / "labels.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels\.csv"):
        load_bags(str(folder))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_bags(str(folder / "nowhere"))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 1)), min_size=1, max_size=40), st.integers(0, 5))
def test_no_patient_is_in_two_splits(others: list[tuple[int, int]], seed: int) -> None:
    certain = [(100 + i, i % 2) for i in range(6)]  # three patients of each class at least
    pairs = certain + others
    empty = Instances(torch.zeros(1, 2))
    bags = [Bag(f"s{i}", label, empty, f"p{patient}") for i, (patient, label) in enumerate(pairs)]
    split = split_by_patient(bags, seed)
    assert [bag.name for bag in split] == [bag.name for bag in bags]
    places: dict[str, set[str]] = {}
    for bag in split:
        places.setdefault(bag.patient, set()).add(bag.split)
    assert all(len(found) == 1 for found in places.values())
    assert {bag.split for bag in split} == set(SPLITS)
    again = split_by_patient(list(reversed(bags)), seed)
    assert {bag.name: bag.split for bag in again} == {bag.name: bag.split for bag in split}


def test_shares_are_checked() -> None:
    with pytest.raises(ValueError, match="three numbers above 0 that sum to 1"):
        split_by_patient([], shares=(0.5, 0.5))


def test_padding() -> None:
    bags = [Bag(str(n), n % 2, Instances(torch.ones(n, 3))) for n in (2, 5)]
    x, valid, labels = pad_bags(bags)
    assert x.shape == (2, 5, 3)
    assert torch.equal(x.sum(-1) / 3, valid.float())
    assert (valid.sum(1).tolist(), labels.tolist()) == ([2, 5], [0, 1])
    loader = torch.utils.data.DataLoader(bags, batch_size=2, collate_fn=pad_bags)  # type: ignore[arg-type]
    assert torch.equal(next(iter(loader)).x, x)
    with pytest.raises(ValueError, match="wide has features of width 4, 2 of width 3"):
        pad_bags([bags[0], Bag("wide", 0, Instances(torch.ones(2, 4)))])
    with pytest.raises(ValueError, match="none is an empty bag"):
        pad_bags([Bag("none", 0, Instances(torch.ones(0, 3)))])
    with pytest.raises(ValueError, match="no bags to pad"):
        pad_bags([])


def test_bags_of_digits(tmp_path: Path) -> None:
    data = digit_bags((6, 4, 8), 20, 2)
    assert [len(data.part(split)) for split in SPLITS] == [6, 4, 8]
    for bag in data.bags:
        features, _, labels = bag.instances()
        assert features.shape == (20, 64)
        assert labels is not None
        assert labels.sum() == 2 * bag.label
    digits = {s: {tuple(row.tolist()) for b in data.part(s) for row in b.instances().features} for s in SPLITS}
    assert not digits["train"] & digits["test"]
    again = BagData.load(_saved(data, tmp_path / "bags.safetensors"))
    assert again.fingerprint() == data.fingerprint() == digit_bags((6, 4, 8), 20, 2).fingerprint()


def _saved(data: BagData, path: Path) -> Path:
    data.save(path)
    return path
