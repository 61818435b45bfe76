"""The settings of `heed compare hallucination`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heed.compare.settings import Settings

SCENES, TINY = "scenes", "tiny"


@dataclass(frozen=True)
class HallucinationSettings(Settings):
    """What `heed compare hallucination` is asked to do, beside what `Settings` says.

    Args:
        methods: "plain" for the model as it is, and names of steering methods.
        model: a folder with an image-text model of transformers and its processor, an id on the Hub, or "tiny": a small
            model that is trained on drawn scenes first, a new one for every seed.
        data: a JSON file of questions as POPE has them, or "scenes": drawn scenes.
        images: folder of the images that a JSON file names; None for the file's own folder.
        seeds: of the tiny model, and of sampling. A given model answers greedily, always the same: one seed.
        questions: how many to ask at most; None for all of a file, and 600 of the scenes.
        batch_size: questions answered together.
        max_new_tokens: the longest answer.
        temperature: of sampling; None for greedy answers.
        tiny_steps: training steps of the tiny model.
        dtype: of a given model: "auto", "float32", "float16" or "bfloat16".
    """

    track: ClassVar[str] = "hallucination"

    methods: tuple[str, ...] = ("plain", "var")
    model: str = TINY
    data: str = SCENES
    images: str | None = None
    out: str = "runs/hallucination"
    seeds: int = 1
    questions: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 64
    temperature: float | None = None
    tiny_steps: int | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("questions", "batch_size", "max_new_tokens", "tiny_steps")
        self.check_positive("temperature")
        if self.model == TINY and self.data != SCENES:
            raise ValueError(f"data={self.data!r}: the tiny model knows drawn scenes only; give a model as well")
        if self.model != TINY and self.temperature is None and self.seeds > 1:
            raise ValueError(
                f"seeds={self.seeds}: greedy answers of a given model are the same for every seed; use one, "
                "or give a temperature"
            )
