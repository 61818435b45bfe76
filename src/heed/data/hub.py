"""Image data sets that Hugging Face `datasets` opens from this machine: saved sets, parquet, arrow, the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from heed.data.folder import TEST, TRAIN
from heed.data.pictures import Picture, common_form, read_pictures
from heed.data.raw import Notes, Raw, Split
from heed.errors import MissingExtra

_IMAGE_COLUMNS = ("image", "img", "pixel_values", "picture")
_LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label")
DATASETS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def is_dataset_folder(path: Path) -> bool:
    """Whether a folder holds a data set in one of the formats of `datasets`, rather than plain images."""
    names = [entry.name for entry in path.iterdir()]
    return "dataset_dict.json" in names or "state.json" in names or any(Path(n).suffix in DATASETS for n in names)


def read_dataset(source: str, choose_side: Callable[[float], int], notes: Notes) -> Raw:
    """Read a data set with an image column and a label column.

    Args:
        source: a folder or file, or the name of a data set in the local cache; nothing is downloaded.
        choose_side: side in pixels to use, from the median of the images' shorter sides.
        notes: told of what is left out.

    Raises:
        ValueError: it cannot be opened, or has no training split, images or labels.
        MissingExtra: `datasets` is not installed.
    """
    found = open_dataset(source)
    train = next((found[name] for name in TRAIN if name in found), None)
    test = next((found[name] for name in TEST if name in found), None)
    if train is None:
        raise ValueError(f"{source} has the splits {', '.join(map(str, found))}, and none named 'train'")
    if test is None:
        notes.doubt(f"{source} has no test split (none named {', '.join(TEST)}); a part of 'train' is used")
    image, label = _columns(train, source)
    classes = _classes(train, label)
    splits = {"train": train} if test is None else {"train": train, "test": test}
    if type(train.features[image]).__name__ == "Image":
        pictures = {name: _pictures(name, split, image, label, classes, notes) for name, split in splits.items()}
        form, readable = common_form([p for split in pictures.values() for p in split], choose_side, notes)
        names = {picture.name for picture in readable}
        read = {
            name: read_pictures([p for p in split if p.name in names], form, notes) for name, split in pictures.items()
        }
    else:
        read = {name: _arrays(name, split, image, label, classes) for name, split in splits.items()}
    return Raw(classes, read["train"], read.get("test"))


def open_dataset(source: str) -> Any:
    """Splits by name, of a data set in a file or folder or in the local cache; nothing is downloaded."""
    try:
        import datasets
        import datasets.config as config
    except ImportError as error:
        raise MissingExtra("datasets", "compare") from error
    path = Path(source)
    try:
        if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
            found = datasets.load_from_disk(source)
        elif path.is_file():
            found = datasets.load_dataset(DATASETS[path.suffix], data_files=source)
        else:
            with _offline(config):
                found = datasets.load_dataset(source)
    except Exception as error:
        # Whatever the reason (missing, corrupt, a format it does not know), the remedy is the same.
        raise ValueError(
            f"data {source!r} is no file or folder that can be read, and `datasets` cannot open it locally: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    return found if isinstance(found, dict) else {"train": found}


@contextlib.contextmanager
def _offline(config: Any) -> Iterator[None]:
    """Keep `datasets` to what this machine has, as HF_HUB_OFFLINE=1 would have done from the start."""
    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _columns(split: Any, source: str) -> tuple[str, str]:
    kinds = {name: type(feature).__name__ for name, feature in split.features.items()}
    image = next((n for n, kind in kinds.items() if kind == "Image"), None)
    image = image or next((n for n in _IMAGE_COLUMNS if n in kinds), None)
    label = next((n for n, kind in kinds.items() if kind == "ClassLabel"), None)
    label = label or next((n for n in _LABEL_COLUMNS if n in kinds), None)
    if image is None or label is None:
        missing, known = ("image", _IMAGE_COLUMNS) if image is None else ("label", _LABEL_COLUMNS)
        raise ValueError(
            f"{source} has the columns {', '.join(kinds)}; none is the {missing} (named {', '.join(known)})"
        )
    return image, label


def _classes(split: Any, label: str) -> list[str]:
    feature = split.features[label]
    if hasattr(feature, "names"):
        return list(feature.names)
    return [str(value) for value in sorted(set(split[label]))]


def _labels(split: Any, label: str, classes: list[str]) -> list[int]:
    """Indices into `classes`; -1 where a label is missing or unknown."""
    values = split[label]
    if hasattr(split.features[label], "names"):
        return [-1 if value is None else value for value in values]
    index = {name: i for i, name in enumerate(classes)}
    return [index.get(str(value), -1) for value in values]


def _pictures(name: str, split: Any, image: str, label: str, classes: list[str], notes: Notes) -> list[Picture]:
    column = split.select_columns([image])
    pictures = []
    for row, value in enumerate(_labels(split, label, classes)):
        if value < 0:
            notes.leave_out(f"{name} row {row}", "it has no label, or one that does not occur in training")
        else:
            pictures.append(Picture(f"{name} row {row}", value, partial(_picture, column, row, image)))
    return pictures


def _picture(column: Any, row: int, image: str) -> Any:
    picture = column[row][image]
    if picture is None:
        raise ValueError("there is no image")
    return picture


def _arrays(name: str, split: Any, image: str, label: str, classes: list[str]) -> Split:
    rows = [np.asarray(row) for row in split.with_format("numpy")[image]]
    shapes = {row.shape for row in rows}
    if len(shapes) != 1 or len(next(iter(shapes))) not in (2, 3):
        raise ValueError(
            f"column {image!r} of {name} holds arrays of shapes {sorted(shapes)[:4]}; one (H, W[, C]) is needed"
        )
    labels = np.array(_labels(split, label, classes), dtype=np.int64)
    return Split(np.stack(rows), labels, [f"{name} row {row}" for row in range(len(rows))])
