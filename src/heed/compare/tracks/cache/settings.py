"""The settings of `heed compare cache`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heed.compare.settings import Settings
from heed.data.text import TOPICS

TINY = "tiny"
FOUND = "found.json"  # in a trial's folder: depth of each pass key, and whether it was found


@dataclass(frozen=True)
class CacheSettings(Settings):
    """What `heed compare cache` is asked to do, beside what `Settings` says.

    Args:
        methods: see `heed.compare.tracks.cache.methods`.
        model: a folder with a language model of transformers and its tokenizer, an id on the Hub, or "tiny": a small model
            that is trained on the text first, a new one for every seed.
        data: the text, as `heed.data.text.load_text` takes it; the tiny model learns from its first part, and questions
            are about the last.
        seeds: of the tiny model, and of the pass keys.
        prompt: tokens that a model reads before it goes on.
        following: tokens after them, given one by one, whose perplexity counts.
        texts: prompts for perplexity.
        keys: prompts with a pass key, at depths from the beginning to the end.
        batch_size: prompts at once.
        tiny_steps: training steps of the tiny model.
        dtype: of a given model: "auto", "float32", "float16" or "bfloat16".
    """

    track: ClassVar[str] = "cache"

    methods: tuple[str, ...] = ("full", "recent", "h2o", "razor", "zipcache", "hip", "seer")
    model: str = TINY
    data: str = TOPICS
    out: str = "runs/cache"
    seeds: int = 1
    prompt: int = 480
    following: int = 32
    texts: int = 32
    keys: int = 40
    batch_size: int = 8
    tiny_steps: int | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("prompt", "following", "texts", "keys", "batch_size", "tiny_steps")
