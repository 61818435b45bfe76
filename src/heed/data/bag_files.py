"""Files of instance features: .pt, .npy, .h5 and .safetensors. No pickle is ever executed.

features  (n, width) or (1, n, width)    features, feats, embeddings, x, or the file's only tensor
coords    (n, 2), x and y in pixels      coords, coordinates
labels    (n,), of the instances         instance_labels
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from heed.errors import MissingExtra

_FEATURES = ("features", "feats", "embeddings", "x")
_COORDINATES = ("coords", "coordinates")
_LABELS = ("instance_labels",)
_ENDS = 1 << 16  # bytes at both ends of a file that a fingerprint looks at


class Instances(NamedTuple):
    """What is known of a bag's instances.

    Args:
        features: (n, width) float32.
        coordinates: (n, 2), x and y in pixels; None where unknown.
        labels: (n,), 1 for the instances that make the bag what it is; None where unknown.
    """

    features: Float[Tensor, "n C"]
    coordinates: Int64[Tensor, "n 2"] | None = None
    labels: Int64[Tensor, " n"] | None = None


def feature_files(folder: Path) -> dict[str, list[Path]]:
    """The files of features directly in a folder, by the names of their slides."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in _READERS and path.is_file():
            found.setdefault(path.stem, []).append(path)
    return found


def read_shape(path: Path) -> tuple[int, int]:
    """How many instances a file holds, and how wide their features are; read from its header where it has one."""
    return _read(path, lambda entries: _shape(path, _features(path, entries)))


def read_instances(path: Path) -> Instances:
    """The instances in a file.

    Raises:
        ValueError: the file cannot be read, holds no features (n, width), or its parts do not belong together.
        MissingExtra: h5py is needed and not installed.
    """
    return _read(path, lambda entries: _instances(path, entries))


def fingerprint(source: Instances | Path) -> bytes:
    """A digest of instances; of a file its size, beginning and end."""
    digest = hashlib.sha256()
    if isinstance(source, Path):
        size = source.stat().st_size
        digest.update(str(size).encode())
        with source.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
    else:
        for tensor in source:
            digest.update(b"-" if tensor is None else tensor.contiguous().numpy().data)
    return digest.digest()


def _instances(path: Path, entries: dict[str, Any]) -> Instances:
    found = _features(path, entries)
    count, width = _shape(path, found)
    features = _tensor(found[...]).reshape(count, width).float()
    if not features.isfinite().all():
        row = (~features.isfinite().all(1)).nonzero()[0].item()
        raise ValueError(f"{path}: the features of instance {row} are not finite; extract them again")
    parts = []
    for names, shape in ((_COORDINATES, (count, 2)), (_LABELS, (count,))):
        name = next((name for name in names if name in entries), None)
        if name is None:
            parts.append(None)
            continue
        part = _tensor(entries[name][...])
        part = part[0] if part.ndim == len(shape) + 1 and len(part) == 1 else part
        if tuple(part.shape) != shape:
            raise ValueError(f"{path}: {name} {tuple(part.shape)} does not belong to {count} instances; {shape} would")
        parts.append(part.long())
    return Instances(features, *parts)


def _features(path: Path, entries: dict[str, Any]) -> Any:
    name = next((name for name in _FEATURES if name in entries), None)
    if name is None:
        others = [key for key in entries if key not in (*_COORDINATES, *_LABELS)]
        if len(others) != 1:
            raise ValueError(
                f"{path} holds {', '.join(entries) or 'nothing'}; name its features {' or '.join(_FEATURES)}"
            )
        name = others[0]
    return entries[name]


def _shape(path: Path, features: Any) -> tuple[int, int]:
    shape = tuple(features.shape)
    inner = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(inner) != 2:
        raise ValueError(f"{path} holds features {shape}; (instances, width) is needed")
    if inner[0] == 0:
        raise ValueError(f"{path} holds an empty bag; leave its slide out of the table")
    return inner


def _tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


def _read(path: Path, use: Callable[[dict[str, Any]], Any]) -> Any:
    """Give `use` the arrays of a file by name, while it is open."""
    return _READERS[path.suffix](path, use)


def _read_torch(path: Path, use: Callable[[dict[str, Any]], Any]) -> Any:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: it holds more than tensors, and reading it could run code") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable file of tensors (truncated?): {error}") from error
    entries = content if isinstance(content, dict) else {"features": content}
    return use({str(key): value for key, value in entries.items() if isinstance(value, Tensor)})


def _read_numpy(path: Path, use: Callable[[dict[str, Any]], Any]) -> Any:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable array (truncated, or of Python objects?): {error}") from error
    return use({"features": array})


def _read_safetensors(path: Path, use: Callable[[dict[str, Any]], Any]) -> Any:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return use({key: _Slice(file.get_slice(key)) for key in file.keys()})  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated?): {error}") from error


class _Slice:
    """A tensor of a safetensors file, with the shape that arrays have."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self.shape = tuple(part.get_shape())

    def __getitem__(self, index: Any) -> Tensor:
        return self.part[index]


def _read_h5(path: Path, use: Callable[[dict[str, Any]], Any]) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra("h5py", "slides") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is not a readable HDF5 file (truncated?): {error}") from error
    with file:
        return use({key: value for key, value in file.items() if isinstance(value, h5py.Dataset)})


_READERS = {
    ".pt": _read_torch,
    ".npy": _read_numpy,
    ".safetensors": _read_safetensors,
    ".h5": _read_h5,
}
