"""The methods of `cache`, with settings that fit prompts of any length; a new one is one entry in `METHODS`.

An entry makes the method for a host and its settings; it may learn from the host's training text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from heed.compare.tracks.cache.host import CacheHost
from heed.compare.tracks.cache.settings import CacheSettings
from heed.engine.sequences import Window
from heed.errors import unknown
from heed.language.caches.method import CacheMethod
from heed.language.h2o import H2O
from heed.language.hip import HiP
from heed.language.patterned import Patterned
from heed.language.razor import Razor, profile_heads
from heed.language.seer import BlockChoice, GateSettings, SeerAttention, SeerGates, distill
from heed.language.zipcache import ZipCache
from heed.methods import Method

FULL = "full"  # the model as it is
_FEW_LAYERS = 8  # a model with fewer has no layers to spare that stay dense


_GATE_STEPS, _GATE_BATCH = 100, 4  # SeerAttention's gates are trained first, on prompts of the training text


def _hip(host: CacheHost, settings: CacheSettings) -> Method:
    wanted = max(1, settings.prompt // 8 // 2)
    layers = host.model.config.get_text_config(decoder=True).num_hidden_layers
    dense = () if layers < _FEW_LAYERS else HiP().dense_layers
    window = max(16, settings.prompt // 16)
    return HiP(mask_k=2 * wanted, block_q=16, window=window, sinks=4, dense_queries=0, dense_layers=dense)


def _razor(host: CacheHost, settings: CacheSettings, store: CacheMethod | None = None) -> Method:
    config = host.model.config.get_text_config(decoder=True)
    special = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    bos = next((token for token in special if token is not None), 0)
    segment = max(2, min(2500, config.vocab_size // 2, settings.prompt // 4))
    heads = profile_heads(host.model, segment=segment, bos=bos).select()
    return Razor(heads, window=max(8, settings.prompt // 16), divisor=None, store=store)


def _seer(host: CacheHost, settings: CacheSettings) -> Method:
    gates = SeerGates.fresh(host.model, GateSettings(block=max(8, min(64, settings.prompt // 30))), seed=0)
    most = len(host.train) - settings.prompt
    if most < 1:
        raise ValueError(
            f"SeerAttention's gates learn from prompts, and the training text has {len(host.train)} tokens"
        )

    def batches() -> Iterator[Tensor]:
        while True:
            starts = torch.randint(most, (_GATE_BATCH, 1))
            yield host.train[starts + torch.arange(settings.prompt)].to(host.model.device)

    distill(host.model, gates, batches(), steps=_GATE_STEPS)
    return SeerAttention(gates, BlockChoice("nz_ratio", 0.25))


METHODS: dict[str, Callable[[CacheHost, CacheSettings], Method | None]] = {
    FULL: lambda host, settings: None,
    "h2o": lambda host, settings: H2O(0.1, 0.1),
    "hip": _hip,
    "razor": _razor,
    "razor-zipcache": lambda host, settings: _razor(host, settings, ZipCache()),
    "recent": lambda host, settings: H2O(0, 0.2),
    "seer": _seer,
    "window": lambda host, settings: Patterned(Window(settings.prompt // 4)),
    "zipcache": lambda host, settings: ZipCache(),
}


def check_methods(methods: Sequence[str]) -> None:
    """Raise ValueError for a method that there is not."""
    for method in methods:
        if method not in METHODS:
            raise ValueError(unknown("method", method, METHODS))
