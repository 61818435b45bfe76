"""What several trials share, such as a small model to try methods on: made by the first that needs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder, made when it is not there yet; trials that need it meanwhile wait.

    Args:
        folder: where it is.
        make: makes it, whole or not at all.
    """
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            make(folder)
    return folder
