"""The track `hallucination`, in the words of `heed.compare.track`.

OUT/questions.json               what is asked
OUT/trials/tiny-SEED/            the tiny model, trained once and shared by the methods
OUT/trials/METHOD-SEED/answers.json
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from heed.checkpoint import write_atomically
from heed.compare.machine import device_kind, draw
from heed.compare.once import made_once
from heed.compare.results import Cost, DataSummary, Results
from heed.compare.track import Track, Trial
from heed.compare.tracks.hallucination.questions import FILE, Item, Questions, load_questions, scene_image
from heed.compare.tracks.hallucination.scores import METRICS, judge
from heed.compare.tracks.hallucination.settings import TINY, HallucinationSettings
from heed.errors import unknown
from heed.hosts.saving import save_whole
from heed.methods import apply
from heed.multimodal.answering import answer, load_model, prepare
from heed.multimodal.ask import open_image
from heed.multimodal.host import read_host
from heed.multimodal.registry import steering

_LEARN_FROM = 4  # batches that a method may look at before it begins, such as VAR for sink dimensions


class Hallucination(Track):
    """Ask what is in images; see the package."""

    name = "hallucination"
    metrics = METRICS
    costs = (
        Cost("speed", "answers/s", "answers per second", plot="speed: answers per second"),
        Cost("forwards", "forwards", "decoder forwards per step of writing"),
    )
    template = "tracks/hallucination/report.html.j2"
    explained = "Accuracy is the share of the yes-or-no questions that are answered right"

    def check(self, settings: HallucinationSettings) -> None:
        for method in settings.methods:
            if method not in steering.names():
                raise ValueError(unknown("method", method, steering.names()))

    def load(self, settings: HallucinationSettings) -> Questions:
        return load_questions(settings)

    def fingerprint(self, data: Questions) -> str:
        return data.fingerprint()

    def save(self, data: Questions, out: Path) -> list[str]:
        data.save(out / FILE)
        return [FILE]

    def read(self, settings: HallucinationSettings) -> Questions:
        return Questions.read(Path(settings.out) / FILE)

    def describe(self, data: Questions) -> DataSummary:
        details = {
            "yes": sum(item.label == "yes" for item in data.asked),
            "descriptions": len(data.described),
            "images": len({item.image for item in data.items}),
        }
        return DataSummary(data.name, 0, len(data.asked), "questions", details, data.notes)

    def trial(self, trial: Trial, data: Questions) -> dict[str, float]:
        settings: HallucinationSettings = trial.settings
        model, processor = _host(trial)
        batches = list(_batches(data.items, settings.batch_size))
        trial.steps = len(data.items)
        torch.manual_seed(draw("answers", trial.seed))
        options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens}
        if settings.temperature is not None:
            options |= {"do_sample": True, "temperature": settings.temperature}

        def inputs(batch: list[Item]) -> dict[str, torch.Tensor]:
            return prepare(model, processor, [_image(item) for item in batch], [item.text for item in batch])

        method = steering.get(trial.method)(model, [inputs(batch) for batch in batches[:_LEARN_FROM]])
        answers: list[str] = []
        seconds, meter = 0.0, _Meter()
        with contextlib.ExitStack() as stack:
            if method is not None:
                stack.enter_context(apply(model, method))
            stack.callback(read_host(model).language.register_forward_pre_hook(meter.forward).remove)
            for batch in batches:
                given = inputs(batch)
                begin = time.perf_counter()
                answers += answer(model, processor, given, stopping_criteria=[meter], **options)
                seconds += time.perf_counter() - begin
                trial.tell(len(answers))
        write_atomically(trial.folder / "answers.json", json.dumps(answers) + "\n")
        trial.costs |= {"speed": len(answers) / seconds, "forwards": meter.forwards / meter.steps}
        return judge(data, answers)

    def pictures(self, results: Results, folder: Path) -> dict[str, Any]:
        from heed.compare.tracks.hallucination.pictures import examples

        return {"examples": examples(results, folder)}


class _Meter:
    """Counts steps of writing, as a stopping criterion that never stops, and forwards of the decoder."""

    def __init__(self) -> None:
        self.steps = self.forwards = 0

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.steps += 1
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def forward(self, *_: Any) -> None:
        self.forwards += 1


def _batches(items: tuple[Item, ...], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _image(item: Item) -> Any:
    return scene_image(item.image) if isinstance(item.image, int) else open_image(item.image)


def _host(trial: Trial) -> tuple[Any, Any]:
    """The model and its processor; the tiny one is trained when it is not there yet."""
    settings: HallucinationSettings = trial.settings
    if settings.model != TINY:
        return load_model(settings.model, device=trial.device, dtype=settings.dtype)
    folder = made_once(trial.folder.parent / f"{TINY}-{trial.seed}", lambda folder: _train(trial, folder))
    return load_model(folder, device=trial.device, dtype="float32")


def _train(trial: Trial, folder: Path) -> None:
    from heed.multimodal.tiny import STEPS, tiny_model, tiny_processor, train_tiny

    steps = trial.settings.tiny_steps or STEPS
    every = max(1, steps // 100)
    model, processor = tiny_model(draw("model", trial.seed)), tiny_processor()
    trial.steps = steps

    def report(step: int, loss: float) -> None:
        if step % every == 0:
            trial.tell(step, loss)

    train_tiny(model.to(device_kind(trial.device)), processor, steps=steps, seed=trial.seed, report=report)
    save_whole(folder, model, processor)


TRACK = Hallucination()
