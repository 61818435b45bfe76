"""The methods of `language`: what each makes of the settings; a new one is one entry.

Most are methods applied to one small decoder; those with an architecture of their own are built at its width and depth.
Methods that choose keys for a block of queries together, as HiP and SeerAttention do, are in the track `cache` only: in a
block the choice for one byte depends on the bytes after it, which would be a hint at what is to be predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from heed.compare.tracks.language.models import Hosted, TextModel
from heed.compare.tracks.language.settings import LanguageSettings
from heed.engine.sequences import Dilated, Strided, Window
from heed.errors import unknown
from heed.language.patterned import Patterned
from heed.methods import Method


def _moh(settings: LanguageSettings) -> Method:
    from heed.language.moh import QueryNormMoH

    del settings
    return QueryNormMoH()


# Applied to the decoder in training and afterwards.
APPLIED: dict[str, Callable[[LanguageSettings], Method | None]] = {
    "softmax": lambda settings: None,
    "window": lambda settings: Patterned(Window(settings.context // 8 - 1)),
    "dilated": lambda settings: Patterned(Dilated(settings.context // 8, 2)),
    "strided": lambda settings: Patterned(Window(settings.context // 16 - 1) | Strided(16)),
    "moh": _moh,
}
# Models of their own.
MODELS: dict[str, Callable[[LanguageSettings], TextModel]] = {}


def check_methods(methods: Sequence[str]) -> None:
    """Raise ValueError for a method that there is not."""
    for method in methods:
        if method not in APPLIED and method not in MODELS:
            raise ValueError(unknown("method", method, (*APPLIED, *MODELS)))


def build_model(method: str, settings: LanguageSettings) -> TextModel:
    """A new model of a method."""
    if method in MODELS:
        return MODELS[method](settings)
    return Hosted(settings, APPLIED[method](settings))
