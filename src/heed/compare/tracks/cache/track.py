"""The track `cache`, in the words of `heed.compare.track`.

OUT/trials/tiny-SEED/                the tiny model, trained once and shared by the methods
OUT/trials/METHOD-SEED/found.json    depth of each pass key, and whether it was found
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from heed.checkpoint import write_atomically
from heed.compare.machine import draw
from heed.compare.results import Cost, DataSummary, Metric, Results
from heed.compare.track import Track, Trial
from heed.compare.tracks.cache.host import prepare
from heed.compare.tracks.cache.methods import METHODS, check_methods
from heed.compare.tracks.cache.scores import Continued, continued
from heed.compare.tracks.cache.settings import FOUND, TINY, CacheSettings
from heed.data.text import TextData, load_text
from heed.hosts.loading import check_source
from heed.language.caches.method import CacheSource
from heed.language.passkey import found_keys
from heed.methods import apply

_DATA = "text.safetensors"


class Caches(Track):
    """Read a text, go on with it, and look something up in it; see the package."""

    name = "cache"
    metrics = (
        Metric("perplexity", "perplexity", "lower", "number", margin=0.002),
        Metric("change", "change", "lower"),
        Metric("found", "found"),
    )
    costs = (
        Cost("bytes", "memory", "cache bytes per token", unit="B", plot="memory: cache bytes per token"),
        Cost("prefill", "prefill/s", "prompt tokens/s"),
        Cost("decode", "decode/s", "decoded tokens/s"),
    )
    charted = ("perplexity", "found")
    template = "tracks/cache/report.html.j2"
    explained = (
        "Perplexity is that of the tokens after a prompt, given one by one, as the method's cache predicts them; its change "
        "is against the model as it is"
    )

    def check(self, settings: CacheSettings) -> None:
        check_methods(settings.methods)
        if settings.model != TINY:
            check_source(settings.model)

    def load(self, settings: CacheSettings) -> TextData:
        return load_text(settings.data)

    def fingerprint(self, data: TextData) -> str:
        return data.fingerprint()

    def save(self, data: TextData, out: Path) -> list[str]:
        data.save(out / _DATA)
        return [_DATA]

    def read(self, settings: CacheSettings) -> TextData:
        return TextData.load(Path(settings.out) / _DATA)

    def describe(self, data: TextData) -> DataSummary:
        return DataSummary(data.name, len(data.train), len(data.test), "bytes", notes=data.notes)

    def trial(self, trial: Trial, data: TextData) -> dict[str, float]:
        settings: CacheSettings = trial.settings
        host = prepare(trial, data)
        torch.manual_seed(draw("method", trial.seed))
        method = METHODS[trial.method](host, settings)
        trial.steps = len(host.texts) + len(host.keys)

        def go_on() -> Continued:
            return continued(host.model, host.texts, settings.prompt, new_cache, settings.batch_size, trial.tell)

        def new_cache() -> Any:
            return source.cache() if source is not None else _dynamic(host.model)

        source: CacheSource | None = None
        plain = go_on()
        with contextlib.ExitStack() as stack:
            ours = plain
            if method is not None:
                handle = stack.enter_context(apply(host.model, method))
                source = handle.state if isinstance(handle.state, CacheSource) else None
                ours = go_on()
            found = found_keys(host.model, host.keys, cache=new_cache, batch=settings.batch_size)
        kept = [[prompt.depth, bool(right)] for prompt, right in zip(host.keys, found.tolist(), strict=True)]
        write_atomically(trial.folder / FOUND, json.dumps(kept) + "\n")
        trial.costs |= {"bytes": ours.bytes, "prefill": ours.prefill, "decode": ours.decode}
        return {
            "perplexity": ours.perplexity,
            "change": ours.perplexity / plain.perplexity - 1,
            "found": found.float().mean().item(),
        }

    def pictures(self, results: Results, folder: Path) -> dict[str, Any]:
        from heed.compare.tracks.cache.pictures import depths

        return {"depths": depths(results, folder)}


def _dynamic(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


TRACK = Caches()
