"""The track `language`, in the words of `heed.compare.track`.

OUT/trials/METHOD-SEED/positions.json    bits per byte at every place in the context
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from heed.checkpoint import write_atomically
from heed.compare.machine import check_precision, describe_machine, draw, is_leader, repeatable
from heed.compare.measure import FOREVER, peak_memory, rate, steps_in
from heed.compare.results import Cost, DataSummary, Metric, Results
from heed.compare.table import join
from heed.compare.track import Measured, Track, Trial
from heed.compare.tracks.language.learner import TextLearner
from heed.compare.tracks.language.methods import TOLD, build_model, check_methods
from heed.compare.tracks.language.settings import POSITIONS, LanguageSettings
from heed.compare.training import Training
from heed.data.text import TextData, load_text

BITS = Metric("bits", "bits per byte", "lower", "number")
STEPS = 600  # of a trial, where no budget is given
_DATA = "text.safetensors"


class Language(Track):
    """Train language models of bytes; see the package."""

    name = "language"
    metrics = (BITS,)
    costs = (
        Cost("parameters", "parameters", plot="size: parameters"),
        Cost("train", "train/s", "training bytes/s", plot="speed: bytes per second in training"),
        Cost("infer", "infer/s", "scored bytes/s", plot="speed: bytes per second in scoring"),
        Cost("memory", "memory", "peak memory", unit="B"),
    )
    template = "tracks/language/report.html.j2"
    explained = (
        "Bits per byte are the mean of -log2 p of the test text's bytes, each with at least half a context before it, at "
        "the end of training; less is better"
    )

    def check(self, settings: LanguageSettings) -> None:
        check_methods(settings.methods)
        check_precision(settings)

    def load(self, settings: LanguageSettings) -> TextData:
        data = load_text(settings.data)
        for part, text in (("to learn from", data.train), ("to test on", data.test)):
            if len(text) <= settings.context:
                raise ValueError(
                    f"data={settings.data!r} has {len(text)} bytes {part}, and context={settings.context} needs more; "
                    "give more text or a shorter context"
                )
        return data

    def fingerprint(self, data: TextData) -> str:
        return data.fingerprint()

    def save(self, data: TextData, out: Path) -> list[str]:
        data.save(out / _DATA)
        return [_DATA]

    def read(self, settings: LanguageSettings) -> TextData:
        return TextData.load(Path(settings.out) / _DATA)

    def describe(self, data: TextData) -> DataSummary:
        return DataSummary(data.name, len(data.train), len(data.test), "bytes", notes=data.notes)

    def measure(self, settings: LanguageSettings, method: str, data: TextData, threads: int, parallel: int) -> Measured:
        with repeatable(threads, settings.device):
            torch.manual_seed(0)
            learner, peak = peak_memory(
                lambda: TextLearner(settings, build_model(method, settings), data, FOREVER), settings.device
            )
            parameters = sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
            train = rate(learner.batch * learner.context, threads, lambda: learner.step(0, 0))
            ids = learner.batch_at(0, 0)
            learner.model.eval()
            with torch.no_grad():
                together = ids[:, 1:].numel() * learner.accelerator.num_processes
                infer = rate(together, threads, lambda: learner.model(ids))
        costs = {"parameters": parameters, "train": train, "infer": infer, "memory": peak}
        steps = _budget(settings, data, learner, train, infer, parallel)
        return Measured(describe_machine(learner.device, threads), costs, steps)

    def trial(self, trial: Trial, data: TextData) -> dict[str, float]:
        torch.manual_seed(draw("model", trial.seed))
        model = build_model(trial.method, trial.settings)
        learner = TextLearner(trial.settings, model, data, trial.steps, trial.device)
        Training(trial).learn(learner, BITS, learner.bits)
        positions = learner.by_position()
        if is_leader():
            seen = [None if math.isnan(bits) else bits for bits in positions.tolist()]
            write_atomically(trial.folder / POSITIONS, json.dumps(seen) + "\n")
            model.save(trial.folder / "model")
        return {BITS.name: trial.curve.values[BITS.name][-1]}

    def pictures(self, results: Results, folder: Path) -> dict[str, Any]:
        from heed.compare.tracks.language.pictures import context_use

        recipe = None
        if results.best is not None:
            settings = LanguageSettings(**results.settings)
            path = (folder / results.best.path).as_posix()
            recipe = build_model(results.best.method, settings).recipe(path)
        told = join([row.method for row in results.methods if row.method in TOLD])
        return {"positions": context_use(results, folder), "recipe": recipe, "told": told}


def _budget(
    settings: LanguageSettings, data: TextData, learner: TextLearner, train: float, infer: float, parallel: int
) -> int:
    """Optimiser steps of every trial of a method."""
    step = learner.batch * learner.context
    if settings.minutes is not None:
        share = 60 * settings.minutes * parallel / (len(settings.methods) * settings.seeds)
        return steps_in(share, learner.test.numel(), step, train, infer)
    if settings.epochs is not None:
        return max(1, settings.epochs * len(data.train) // step)
    return settings.steps or STEPS


TRACK = Language()
