"""Where bags come from: a folder of feature files with a table of labels, or bags of digits that need no download."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch

from heed.data.bag_files import Instances, feature_files, read_shape
from heed.data.bags import SPLITS, Bag, BagData, split_by_patient
from heed.errors import MissingExtra

LABELS = "labels.csv"
DIGIT = 9  # what a positive bag of digits holds
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


def load_bags(source: str, labels: str | Path | None = None, *, seed: int = 0) -> BagData:
    """Read bags of instance features.

    Args:
        source: "digits" for bags of scikit-learn's digits, or a folder with one file per slide: .pt, .h5, .npy or
            .safetensors, see `heed.data.bag_files`.
        labels: a csv file with the columns slide and label, and where they are known patient and split (train, val,
            test); None for labels.csv in the folder. A slide is the name of its file, with or without the suffix.
        seed: of the split by patients, where the table has none.

    Raises:
        ValueError: slides are missing, named twice or empty, widths differ, a patient is in two splits, or a class is
            missing from one.
        FileNotFoundError: a path leads nowhere.
    """
    if source == "digits":
        return digit_bags()
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"data {source!r}: there is no such folder; give one of feature files, or 'digits'")
    table = folder / LABELS if labels is None else Path(labels).expanduser()
    if not table.is_file():
        raise FileNotFoundError(f"{table}: there is no such file; it says which slide has which label")
    rows = _read_table(table)
    files = feature_files(folder)
    classes = sorted({row["label"] for row in rows}, key=lambda name: (not name.isdigit(), name.zfill(9)))
    bags, width, first = [], 0, None
    for row in rows:
        path = _file_of(row["slide"], files, folder, table)
        _, own = read_shape(path)
        if first is None:
            width, first = own, path
        if own != width:
            raise ValueError(
                f"{path.name} has features of width {own}, {first.name} of {width}; use one encoder for all"
            )
        patient = row.get("patient") or row["slide"]
        bags.append(Bag(path.stem, classes.index(row["label"]), path, patient, row.get("split", "")))
    notes = []
    unlabelled = sorted(files.keys() - {bag.name for bag in bags})
    if unlabelled:
        named = ", ".join(unlabelled[:5]) + (", ..." if len(unlabelled) > 5 else "")
        notes.append(f"{len(unlabelled)} file(s) without a row in {table.name} were left out: {named}")
    if not any(bag.split for bag in bags):
        bags = split_by_patient(bags, seed)
        notes.append("patients were split into train, val and test by heed")
    elif not any(bag.split == "val" for bag in bags):
        held = [bag for bag in bags if bag.split == "train"]
        bags = [bag for bag in bags if bag.split != "train"] + _hold_out(held, seed)
        notes.append("a fifth of the training patients was set apart for validation by heed")
    return BagData(source, tuple(classes), width, tuple(bags), tuple(notes))


def _hold_out(bags: list[Bag], seed: int) -> list[Bag]:
    """A fifth of the patients of training bags for validation."""
    apart = split_by_patient(bags, seed, (0.6, 0.2, 0.2))
    return [Bag(b.name, b.label, b.source, b.patient, "val" if b.split == "val" else "train") for b in apart]


def _read_table(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = [name.strip() for name in reader.fieldnames or ()]
        missing = {"slide", "label"} - set(columns)
        if missing:
            raise ValueError(
                f"{table} has the columns {', '.join(columns) or 'none'}; {' and '.join(sorted(missing))} must be among them"
            )
        rows = [{(key or "").strip(): (value or "").strip() for key, value in row.items()} for row in reader]
    seen: set[str] = set()
    for number, row in enumerate(rows, 2):
        if not row["slide"] or not row["label"]:
            raise ValueError(
                f"{table}, line {number}: slide {row['slide']!r} with label {row['label']!r}; fill both in"
            )
        if row["slide"] in seen:
            raise ValueError(f"{table}, line {number}: slide {row['slide']!r} is there twice; keep one row of it")
        seen.add(row["slide"])
        if row.get("split"):
            split = row["split"].lower()
            if split not in _SPLIT_NAMES:
                raise ValueError(f"{table}, line {number}: split {row['split']!r}; use {', '.join(SPLITS)}")
            row["split"] = _SPLIT_NAMES[split]
    if not rows:
        raise ValueError(f"{table} holds no slides")
    unsplit = [row["slide"] for row in rows if not row.get("split")]
    if 0 < len(unsplit) < len(rows):
        raise ValueError(f"{table}: slide {unsplit[0]!r} has no split while others do; give all of them one, or none")
    return rows


def _file_of(slide: str, files: dict[str, list[Path]], folder: Path, table: Path) -> Path:
    found = files.get(slide) or [p for p in files.get(Path(slide).stem, []) if p.name == slide]
    if not found:
        raise ValueError(
            f"{table.name} names the slide {slide!r}, and {folder} has no .pt, .h5, .npy or .safetensors file of it"
        )
    if len(found) > 1:
        raise ValueError(
            f"slide {slide!r} has {len(found)} files: {', '.join(p.name for p in found)}; keep one of them"
        )
    return found[0]


def digit_bags(
    counts: tuple[int, int, int] = (120, 40, 200), size: int = 80, positives: int = 4, seed: int = 0
) -> BagData:
    """Bags of scikit-learn's digits: does the bag hold a nine?

    Pixels are standardised over all digits. No digit is in two splits, and none is twice in a bag.

    Args:
        counts: bags of train, val and test; every second one is positive.
        size: digits in a bag.
        positives: nines in a positive bag.
        seed: of the draws.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "compare") from error
    x, y = load_digits(return_X_y=True)
    x = (x - x.mean()) / x.std()
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(y))
    cuts = np.split(order, [int(0.5 * len(y)), int(0.65 * len(y))])
    bags = []
    for split, count, members in zip(SPLITS, counts, cuts, strict=True):
        nines, others = members[y[members] == DIGIT], members[y[members] != DIGIT]
        for i in range(count):
            label = i % 2
            few = draw.choice(nines, positives * label, replace=False)
            chosen = draw.permutation(np.concatenate([few, draw.choice(others, size - len(few), replace=False)]))
            features, labels = (
                torch.from_numpy(x[chosen]).float(),
                torch.from_numpy((y[chosen] == DIGIT).astype(np.int64)),
            )
            name = f"{split}-{i:03d}"
            bags.append(Bag(name, label, Instances(features, None, labels), name, split))
    return BagData("digits", ("no nine", "a nine"), x.shape[1], tuple(bags))
