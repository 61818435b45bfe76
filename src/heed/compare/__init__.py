"""heed compare: methods side by side in the same host, on the same data, at the same budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heed.compare.results import Results
from heed.compare.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from heed.compare.progress import Progress

__all__ = ["Results", "Settings", "classify"]


def classify(settings: Settings, *, on_progress: Callable[[Progress], None] | None = None) -> Results:
    """Train and measure every method on a classification task; write and return the results.

    Everything is written below `settings.out`: results.json, one folder per trial, the best model and six test images.
    A run that was interrupted goes on where it was when this is called again with the same settings.

    Args:
        settings: see `Settings`.
        on_progress: called in this process with every `heed.compare.progress.Progress`.

    Raises:
        ValueError: a setting, a method's name or the data is wrong, or `out` holds another run.
        OSError: `out` cannot be written.
        MissingExtra: a library of the `compare` or `ray` extra is not installed.
    """
    from heed.compare.run import run_classify

    return run_classify(settings, on_progress=on_progress)
