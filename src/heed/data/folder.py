"""A folder of images: one sub-folder per class, with or without train and test folders above them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from heed.data.pictures import Picture, common_form, read_pictures
from heed.data.raw import Notes, Raw
from heed.errors import MissingExtra

TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def read_folder(path: Path, choose_side: Callable[[float], int], notes: Notes) -> Raw:
    """Read `path/CLASS/IMAGE` or `path/{train,test}/CLASS/IMAGE`; class names are the folders' names, sorted.

    Args:
        path: the folder.
        choose_side: side in pixels to use, from the median of the images' shorter sides.
        notes: told of corrupt images, empty classes and a missing test split.

    Raises:
        ValueError: no class folders, fewer than two classes with images, or no training split.
    """
    folders = _subfolders(path)
    by_name = {folder.name.lower(): folder for folder in folders}
    train_root = next((by_name[name] for name in TRAIN if name in by_name), None)
    test_root = next((by_name[name] for name in TEST if name in by_name), None)
    if train_root is None and test_root is not None:
        raise ValueError(
            f"{path} has a folder {test_root.name!r} but none named 'train'; add one with the training images"
        )
    if train_root is not None and test_root is None:
        notes.doubt(
            f"{path} has no test split (no folder named {', '.join(TEST)}); a part of {train_root.name!r} is used"
        )
    train = _classes(train_root or path, notes)
    classes = sorted(train)
    if len(classes) < 2:
        raise ValueError(
            f"{train_root or path} holds {len(classes)} class folder(s) with images; put the images of each class "
            "into a folder named after it"
        )
    index = {name: label for label, name in enumerate(classes)}
    test: dict[str, list[Path]] = {}
    if test_root is not None:
        for name, files in _classes(test_root, notes).items():
            if name in index:
                test[name] = files
            else:
                notes.doubt(f"{test_root / name} is left out: there is no class {name!r} in {train_root}")
        for name in classes:
            if name not in test:
                notes.doubt(f"{test_root} has no images of class {name!r}")
    of_train = [_picture(file, index[name]) for name in classes for file in train[name]]
    of_test = [_picture(file, index[name]) for name in sorted(test) for file in test[name]]
    form, readable = common_form(of_train + of_test, choose_side, notes)
    names = {picture.name for picture in readable}
    return Raw(
        classes,
        read_pictures([p for p in of_train if p.name in names], form, notes),
        None if test_root is None else read_pictures([p for p in of_test if p.name in names], form, notes),
    )


def _subfolders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _classes(root: Path, notes: Notes) -> dict[str, list[Path]]:
    found = {}
    for folder in _subfolders(root):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if files:
            found[folder.name] = files
        else:
            notes.doubt(f"class folder {folder} holds no images; the class is left out")
    return found


def _picture(file: Path, label: int) -> Picture:
    return Picture(str(file), label, partial(_open, file))


def _open(file: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("pillow", "compare") from error
    return Image.open(file)
