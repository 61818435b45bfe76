"""Text as bytes, ready to learn from: a file, a folder of files, a data set, or English that comes with Python itself."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import UInt8
from torch import Tensor

from heed.checkpoint import write_atomically
from heed.data.folder import TEST, TRAIN
from heed.data.hub import DATASETS, is_dataset_folder, open_dataset

TOPICS = "topics"  # the topics of Python's help(), about half a megabyte of English
TEST_SHARE = 0.1  # of the text, its end, where the source has no test part
SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".gz"})
_COLUMNS = ("text", "content", "sentence", "document")


@dataclass(frozen=True)
class TextData:
    """Text in memory, as bytes.

    Args:
        name: where it comes from.
        train: (n,) uint8.
        test: (m,) uint8.
        notes: what was done to it that the user should know.
    """

    name: str
    train: UInt8[Tensor, " n"]
    test: UInt8[Tensor, " m"]
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """A digest: two runs with the same one learn from the same text."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part.numpy().data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write as safetensors, atomically."""
        about = {"name": self.name, "notes": "\n".join(self.notes)}
        write_atomically(path, safetensors.torch.save({"train": self.train, "test": self.test}, about))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        with safetensors.safe_open(str(path), "pt") as file:
            about = file.metadata()
            notes = tuple(filter(None, about["notes"].split("\n")))
            return cls(about["name"], file.get_tensor("train"), file.get_tensor("test"), notes)


def load_text(source: str = TOPICS) -> TextData:
    """Read text.

    Args:
        source: "topics"; a text file, also gzipped; a folder of text files, of which those with train or test (or valid)
            in their names are the two parts; or what `datasets` opens on this machine, with a column of text.

    Raises:
        ValueError: there is no such thing, no text in it, or what is there is not text.
        MissingExtra: `datasets` is needed and not installed.
    """
    if source == TOPICS:
        return _split(source, _topics(), b"")
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in DATASETS:
        return _split(path.name, _read([path]), b"")
    if path.is_dir() and not is_dataset_folder(path):
        return _folder(path)
    return _dataset(source)


def _topics() -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def _folder(path: Path) -> TextData:
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"{path} holds no text: none of its files ends in {', '.join(sorted(SUFFIXES))}")
    test = [file for file in files if _named(file, TEST)]
    train = [file for file in files if file not in test and _named(file, TRAIN)]
    if not (train and test):
        return _split(path.name, _read(files), b"")
    return _split(path.name, _read(train), _read(test))


def _named(file: Path, names: Sequence[str]) -> bool:
    return any(part.lower() in names for part in file.name.replace("-", ".").replace("_", ".").split("."))


def _read(files: Sequence[Path]) -> bytes:
    parts = []
    for file in files:
        try:
            part = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        except (OSError, EOFError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if b"\0" in part:
            raise ValueError(f"{file} is not text: it has zero bytes; give plain text, such as UTF-8")
        parts.append(part)
    return b"\n".join(parts)


def _dataset(source: str) -> TextData:
    found = open_dataset(source)
    train = next((found[name] for name in TRAIN if name in found), None)
    test = next((found[name] for name in TEST if name in found), None)
    if train is None:
        raise ValueError(f"{source} has the splits {', '.join(map(str, found))}, and none named 'train'")
    return _split(source, _column(source, train), b"" if test is None else _column(source, test))


def _column(source: str, split: Any) -> bytes:
    name = next((name for name in _COLUMNS if name in split.column_names), None)
    if name is None:
        raise ValueError(
            f"{source} has the columns {', '.join(split.column_names)}; none is text (named {', '.join(_COLUMNS)})"
        )
    return "\n".join(text for text in split[name] if text).encode()


def _split(name: str, train: bytes, test: bytes) -> TextData:
    """The two parts as tensors; without a test part, the end of the text is one."""
    notes = ()
    if not test:
        cut = int(len(train) * (1 - TEST_SHARE))
        train, test = train[:cut], train[cut:]
        notes = (f"the last {TEST_SHARE:.0%} of the text are the test part",)
    if not (train and test):
        raise ValueError(f"{name} holds too little text: {len(train)} bytes to learn from and {len(test)} to test on")
    learnt, tested = (torch.from_numpy(np.frombuffer(part, np.uint8).copy()) for part in (train, test))
    return TextData(name, learnt, tested, notes)
