"""The methods of `language`: what each makes of the settings; a new one is one entry.

Most are methods applied to one small decoder; those with an architecture of their own are built at its width and depth.
Methods that choose keys for a block of queries together, as HiP and SeerAttention do, are in the track `cache` only: in a
block the choice for one byte depends on the bytes after it, which would be a hint at what is to be predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from heed.compare.tracks.language.models import Blocks, Hosted, Routed, TextModel
from heed.compare.tracks.language.settings import LanguageSettings
from heed.engine.sequences import Dilated, Strided, Window
from heed.errors import unknown
from heed.language.grouped import group_kv_heads
from heed.language.moh import QueryNormMoH
from heed.language.patterned import Patterned
from heed.language.selective import SelectiveTemperatures
from heed.language.sinklora import S2Attention, SFAttention
from heed.language.subsampled import StochasticSubsampling
from heed.methods import Method


class _Grouped(Hosted):
    """Half as many key and value heads as query heads, given out to them by the norms of their keys."""

    def __init__(self, settings: LanguageSettings) -> None:
        super().__init__(settings, None)
        group_kv_heads(self.model, max(1, settings.heads // 2))


# Applied to the decoder, from its first step on.
APPLIED: dict[str, Callable[[LanguageSettings], Method | None]] = {
    "softmax": lambda settings: None,
    "window": lambda settings: Patterned(Window(settings.context // 8 - 1)),
    "dilated": lambda settings: Patterned(Dilated(settings.context // 8, 2)),
    "strided": lambda settings: Patterned(Window(settings.context // 16 - 1) | Strided(16)),
    "moh": lambda settings: QueryNormMoH(),
    "s2": lambda settings: S2Attention(),
    "selective": lambda settings: SelectiveTemperatures(),
    "sf": lambda settings: SFAttention(),
    "subsampled": lambda settings: StochasticSubsampling(ratio=4),
}
# Built otherwise.
MODELS: dict[str, Callable[[LanguageSettings], TextModel]] = {
    "block-transformer": Blocks,
    "kdgqa": _Grouped,
    "routing": Routed,
}
# Those that are told a little of what follows: a routing head takes the tokens nearest to a centroid from the whole text.
TOLD = ("routing",)


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
