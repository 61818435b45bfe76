"""idx files, the format of MNIST and Fashion-MNIST, gzipped or not.

0 0 TYPE RANK | RANK sizes, 4 bytes each, big-endian | the numbers, big-endian, last axis fastest
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from heed.data.raw import Notes, Raw, Split

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file.

    Raises:
        ValueError: the file is truncated, corrupt or no idx file.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable gzip file (truncated?): {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _TYPES or content[3] == 0:
        raise ValueError(f"{path} is not an idx file: it begins with {content[:4].hex(' ') or 'nothing'}")
    kind, rank = np.dtype(_TYPES[content[2]]), content[3]
    start = 4 + 4 * rank
    shape = np.frombuffer(content[4:start], ">u4").tolist() if len(content) >= start else []
    expected = start + math.prod(shape) * kind.itemsize
    if len(content) != expected or not shape:
        raise ValueError(f"{path} holds {len(content):,} bytes where its header promises {expected:,} (truncated?)")
    return np.frombuffer(content, kind, offset=start).reshape(shape)


def idx_images(folder: Path) -> list[Path]:
    """The files in a folder that are named like the images of an idx data set."""
    return sorted(p for p in folder.iterdir() if "images" in p.name and "idx" in p.name and p.is_file())


def read_idx_folder(path: Path, notes: Notes) -> Raw:
    """Read a folder of idx files, or one file of images with its labels beside it.

    A pair whose name says "train" is for training and one that says "test" or "t10k" for testing; a single pair is
    for both.

    Raises:
        ValueError: a file is corrupt, labels are missing or do not match, or it is unclear which pair is which.
    """
    files = [path] if path.is_file() else idx_images(path)
    train = [file for file in files if "train" in file.name]
    test = [file for file in files if "train" not in file.name and ("t10k" in file.name or "test" in file.name)]
    if len(files) == 1:
        train, test = files, []
        notes.add(f"{files[0]} is the only set of images; a part of it is used for testing")
    elif len(train) != 1 or len(test) != 1 or len(files) != 2:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} must hold one training and one test set of idx files; found images in {names}")
    splits = [_read_pair(file) for file in (*train, *test)]
    count = 1 + max(int(split.labels.max(initial=0)) for split in splits)
    return Raw([str(label) for label in range(count)], splits[0], splits[1] if test else None)


def _read_pair(images_file: Path) -> Split:
    labels_file = images_file.with_name(images_file.name.replace("images", "labels").replace("idx3", "idx1"))
    if not labels_file.is_file():
        raise ValueError(f"{images_file} has no labels beside it: there is no file {labels_file.name}")
    images, labels = read_idx(images_file), read_idx(labels_file)
    if images.ndim not in (3, 4) or labels.ndim != 1:
        raise ValueError(
            f"{images_file} holds {images.shape} and {labels_file.name} {labels.shape}; (n, H, W) and (n,) are needed"
        )
    if len(images) != len(labels):
        raise ValueError(f"{images_file} holds {len(images)} images, {labels_file.name} {len(labels)} labels")
    if len(images) == 0:
        raise ValueError(f"{images_file} holds no images")
    labels = labels.astype(np.int64)
    if labels.min() < 0:
        raise ValueError(f"{labels_file} holds the label {labels.min()} at {labels.argmin()}; labels start at 0")
    return Split(images, labels, [f"{images_file} image {i}" for i in range(len(images))])
