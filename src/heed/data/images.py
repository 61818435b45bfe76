"""Images with labels, ready to learn from: read from anywhere, checked, brought to one size, split, kept in memory."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from heed.checkpoint import write_atomically
from heed.data.folder import read_folder
from heed.data.hub import is_dataset_folder, read_dataset
from heed.data.idx import idx_images, read_idx_folder
from heed.data.raw import Notes, Raw, Split
from heed.errors import MissingExtra

LARGEST = 64  # pixels a side when the user names no size
TEST_SHARE = 0.2  # of every class, when the source has no test split

_TENSORS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class ImageData:
    """Square images of one size in memory, and what they are.

    Args:
        name: where they come from.
        classes: names of the classes, in the order of the labels.
        train_images, test_images: (n, C, S, S) uint8.
        train_labels, test_labels: (n,) int64.
        notes: what was done to the data that the user should know.
    """

    name: str
    classes: tuple[str, ...]
    train_images: UInt8[Tensor, "n C S S"]
    train_labels: Int64[Tensor, " n"]
    test_images: UInt8[Tensor, "m C S S"]
    test_labels: Int64[Tensor, " m"]
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def side(self) -> int:
        return self.train_images.shape[2]

    def statistics(self) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
        """Mean and standard deviation of the training pixels per channel, on a scale of 0 to 1."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        channels = self.train_images.transpose(0, 1).flatten(1)
        shares = torch.stack([torch.bincount(c, minlength=256) for c in channels]).double() / channels.shape[1]
        mean = shares @ levels
        variance = (shares @ levels.square() - mean.square()).clamp_min(1e-6)
        return mean.float(), variance.sqrt().float()

    def fingerprint(self) -> str:
        """A digest of classes, images and labels: two runs with the same one learn from the same data."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for key in _TENSORS:
            tensor: Tensor = getattr(self, key)
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file, atomically."""
        described = {"name": self.name, "classes": json.dumps(self.classes), "notes": json.dumps(self.notes)}
        tensors = {key: getattr(self, key).contiguous() for key in _TENSORS}
        write_atomically(path, safetensors.torch.save(tensors, metadata=described))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        with safetensors.safe_open(path, "pt") as file:
            described = file.metadata()
            tensors = {key: file.get_tensor(key) for key in _TENSORS}
        classes, notes = (tuple(json.loads(described[key])) for key in ("classes", "notes"))
        return cls(name=described["name"], classes=classes, notes=notes, **tensors)


def patch_size(side: int) -> int:
    """The smallest power of two, but not 1, that cuts images of `side` pixels into at most 14 x 14 patches."""
    patch = 2  # a single pixel says too little to be worth a token
    while side > 14 * patch:
        patch *= 2
    return patch


def load_images(source: str, *, strict: bool = False, image_size: int | None = None) -> ImageData:
    """Read a labelled set of images.

    Where there is no test split, a fifth of every class is set apart, always the same.

    Args:
        source: "digits" for scikit-learn's 8 x 8 digits, which need no download; a folder with one folder of images per
            class, or with train and test folders of such; idx files as of MNIST; or what `datasets` opens locally.
        strict: stop at a corrupt image, an empty class or a missing split, instead of warning and going on.
        image_size: side in pixels to resize to, None for the median of the images' own, at most 64; rounded so that
            patches fit. Proportions are not kept.

    Raises:
        ValueError: there is nothing to learn from, or `strict` and something is wrong; names the file or the sample.
        FileNotFoundError: a path leads nowhere.
        MissingExtra: a library of the `compare` extra is not installed.
    """
    notes = Notes(strict)
    choose_side = partial(_choose_side, image_size=image_size)
    raw = _read(source, choose_side, notes)
    raw.train = _usable(raw.train, notes)
    raw.test = None if raw.test is None else _usable(raw.test, notes)
    if raw.test is None or len(raw.test.labels) == 0:
        raw.train, raw.test = _set_apart(raw.train, raw.classes, notes)
    present = np.unique(raw.train.labels)
    if len(present) < 2:
        named = ", ".join(raw.classes[label] for label in present) or "none"
        raise ValueError(f"{source} has training images of {len(present)} class(es) ({named}); at least two are needed")
    if len(raw.test.labels) == 0:
        raise ValueError(f"{source} has no image left for testing; every class needs at least two")
    train, test = _bytes(raw.train, raw.test)
    side = choose_side(min(train.shape[-2:]))
    if train.shape[-2:] != (side, side):
        notes.add(f"images of {train.shape[-1]} x {train.shape[-2]} pixels were resized to {side} x {side}")
        train, test = (transforms.resize(x, [side, side], antialias=True) for x in (train, test))
    labels = (torch.from_numpy(split.labels) for split in (raw.train, raw.test))
    return ImageData(source, tuple(raw.classes), train, next(labels), test, next(labels), notes.close())


def _read(source: str, choose_side: partial[int], notes: Notes) -> Raw:
    if source == "digits":
        return _digits()
    path = Path(source).expanduser()
    if path.is_dir():
        if idx_images(path):
            return read_idx_folder(path, notes)
        if is_dataset_folder(path):
            return read_dataset(str(path), choose_side, notes)
        return read_folder(path, choose_side, notes)
    if path.is_file():
        return read_idx_folder(path, notes) if "idx" in path.name else read_dataset(str(path), choose_side, notes)
    if path.is_absolute() or source.startswith((".", "~")) or source.count(os.sep) > 1:
        raise FileNotFoundError(f"data {source!r}: there is no such file or folder")
    return read_dataset(source, choose_side, notes)


def _digits() -> Raw:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "compare") from error
    digits: Any = load_digits()
    names = [f"digits image {i}" for i in range(len(digits.target))]
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # the pixels count from 0 to 16
    return Raw([str(name) for name in digits.target_names], Split(levels, digits.target.astype(np.int64), names), None)


def _choose_side(own: float, *, image_size: int | None) -> int:
    side = image_size or min(LARGEST, max(1, round(own)))
    patch = patch_size(side)
    return max(2, round(side / patch)) * patch


def _usable(split: Split, notes: Notes) -> Split:
    """Leave out what no model can learn from: numbers that are not finite, labels that are missing."""
    good = np.ones(len(split.labels), dtype=bool)
    if split.images.dtype.kind == "f":
        good = np.isfinite(split.images.reshape(len(split.images), -1)).all(axis=1)
        for i in np.flatnonzero(~good).tolist():
            bad = "NaN" if np.isnan(split.images[i]).any() else "an infinite number"
            notes.leave_out(split.names[i], f"it contains {bad}")
    for i in np.flatnonzero(split.labels < 0).tolist():
        notes.leave_out(split.names[i], f"its label is {split.labels[i]}")
    good &= split.labels >= 0
    return split if good.all() else split.keep(good)


def _set_apart(split: Split, classes: list[str], notes: Notes) -> tuple[Split, Split]:
    """Training and test parts; the same fifth of every class whenever the same data come."""
    draw = torch.Generator().manual_seed(0)
    for_test = np.zeros(len(split.labels), dtype=bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(split.labels == label)
        if len(members) == 1:
            notes.doubt(f"class {name!r} has a single image, which is used for training; none is left to test it")
        elif len(members) > 1:
            count = max(1, round(TEST_SHARE * len(members)))
            for_test[members[torch.randperm(len(members), generator=draw)[:count].numpy()]] = True
    return split.keep(~for_test), split.keep(for_test)


def _bytes(*splits: Split) -> list[UInt8[Tensor, "n C H W"]]:
    """Images as bytes. Other numbers are taken as shares of 1 or of 255 where they fit, and stretched where not."""
    low = min(float(split.images.min()) for split in splits)
    high = max(float(split.images.max()) for split in splits)
    if all(split.images.dtype == np.uint8 for split in splits) or (low >= 0 and 1 < high <= 255):
        low, high = 0.0, 255.0
    elif low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    tensors = []
    for split in splits:
        images = split.images
        if images.dtype != np.uint8:
            scaled = (images.astype(np.float64) - low) * (255 / max(high - low, 1e-12))
            images = np.round(scaled).astype(np.uint8)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        tensors.append(torch.from_numpy(np.array(images, order="C")))
    return tensors
