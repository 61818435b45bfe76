"""heed compare: methods side by side in the same host, on the same data, at the same budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heed.compare.results import Results
from heed.compare.settings import Settings
from heed.compare.tracks.cache.settings import CacheSettings
from heed.compare.tracks.classify.settings import ClassifySettings
from heed.compare.tracks.hallucination.settings import HallucinationSettings
from heed.compare.tracks.language.settings import LanguageSettings
from heed.compare.tracks.pretrain.settings import PretrainSettings
from heed.compare.tracks.slides.settings import SlidesSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from heed.compare.progress import Progress

__all__ = [
    "CacheSettings",
    "ClassifySettings",
    "HallucinationSettings",
    "LanguageSettings",
    "PretrainSettings",
    "Results",
    "Settings",
    "SlidesSettings",
    "run",
]


def run(settings: Settings, *, on_progress: Callable[[Progress], None] | None = None) -> Results:
    """Carry out a comparison; write and return the results.

    Everything is written below `settings.out`: results.json, one folder per trial and, where models are trained, the
    best one. A run that was interrupted goes on where it was when this is called again with the same settings.

    Args:
        settings: of one of the tracks, such as `ClassifySettings`.
        on_progress: called in this process with every `heed.compare.progress.Progress`.

    Raises:
        ValueError: a setting, a method's name or the data is wrong, or `out` holds another run.
        OSError: `out` cannot be written.
        MissingExtra: a library of the `compare` or `ray` extra is not installed.
    """
    from heed.compare.running import run as carry_out

    return carry_out(settings, on_progress=on_progress)
