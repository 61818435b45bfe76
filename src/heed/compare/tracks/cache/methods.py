"""The methods of `cache`, with settings that fit prompts of any length; a new one is one entry in `METHODS`.

An entry makes the method for a host and its settings; it may learn from the host's training text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from heed.compare.tracks.cache.host import CacheHost
from heed.compare.tracks.cache.settings import CacheSettings
from heed.engine.sequences import Window
from heed.errors import unknown
from heed.language.patterned import Patterned
from heed.methods import Method

FULL = "full"  # the model as it is
_FEW_LAYERS = 8  # a model with fewer has no layers to spare that stay dense


def _hip(host: CacheHost, settings: CacheSettings) -> Method:
    from heed.language.hip import HiP

    wanted = max(1, settings.prompt // 8 // 2)
    small = host.model.config.get_text_config(decoder=True).num_hidden_layers < _FEW_LAYERS
    options = {"dense_layers": ()} if small else {}
    window = max(16, settings.prompt // 16)
    return HiP(mask_k=2 * wanted, block_q=16, window=window, sinks=4, dense_queries=0, **options)


def _zipcache(host: CacheHost, settings: CacheSettings) -> Method:
    from heed.language.zipcache import ZipCache

    del host, settings
    return ZipCache()


METHODS: dict[str, Callable[[CacheHost, CacheSettings], Method | None]] = {
    FULL: lambda host, settings: None,
    "window": lambda host, settings: Patterned(Window(settings.prompt // 4)),
    "hip": _hip,
    "zipcache": _zipcache,
}


def check_methods(methods: Sequence[str]) -> None:
    """Raise ValueError for a method that there is not."""
    for method in methods:
        if method not in METHODS:
            raise ValueError(unknown("method", method, METHODS))
