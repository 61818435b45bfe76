"""The track `slides`, in the words of `heed.compare.track`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from heed.compare.machine import accelerator, describe_machine, draw, is_leader, repeatable
from heed.compare.results import Cost, DataSummary, Results
from heed.compare.track import Measured, Track, Trial
from heed.compare.tracks.slides.methods import build_model, check_methods, recipe
from heed.compare.tracks.slides.scores import METRICS
from heed.compare.tracks.slides.settings import SlidesSettings
from heed.compare.trial import TrainingFailed
from heed.data.bags import BagData, pad_bags
from heed.data.slides import load_bags
from heed.predict.mil.masking import check_masking
from heed.predict.mil.training import BagScores, BagTrainer, evaluate, fit

COSTS = (
    Cost("parameters", "parameters", plot="size: parameters"),
    Cost("train", "train/s", "training bags/s"),
    Cost("infer", "infer/s", "inference bags/s", plot="speed: bags per second in inference"),
)
DATA = "data.safetensors"
_TIMED_BAGS, _TIMED_SECONDS = 8, 0.3


class Slides(Track):
    """Train classifiers of bags; see the package."""

    name = "slides"
    metrics = METRICS
    costs = COSTS
    template = "tracks/slides/report.html.j2"
    explained = (
        "AUC is the area under the ROC curve over the test bags, one class against the rest and averaged over classes, "
        "in the epoch with the largest F1 + AUC on the validation bags"
    )

    def check(self, settings: SlidesSettings) -> None:
        check_methods(settings.methods)
        check_masking(settings.n_masked_patch, settings.mask_drop)

    def load(self, settings: SlidesSettings) -> BagData:
        data = load_bags(settings.data, settings.labels, seed=settings.split_seed)
        if settings.batch_size > len(data.part("train")):
            raise ValueError(
                f"batch_size={settings.batch_size} is more than the {len(data.part('train'))} training bags; lower it"
            )
        return data

    def fingerprint(self, data: BagData) -> str:
        return data.fingerprint()

    def save(self, data: BagData, out: Path) -> list[str]:
        data.save(out / DATA)
        return [DATA]

    def read(self, settings: SlidesSettings) -> BagData:
        return BagData.load(Path(settings.out) / DATA)

    def describe(self, data: BagData) -> DataSummary:
        train, val, test = (data.part(split) for split in ("train", "val", "test"))
        details = {"classes": list(data.classes), "width": data.width, "validation": len(val)}
        return DataSummary(data.name, len(train), len(test), "bags", details, data.notes)

    def measure(self, settings: SlidesSettings, method: str, data: BagData, threads: int, parallel: int) -> Measured:
        del parallel
        bags, way = data.part("train"), recipe(settings, data)
        with repeatable(threads, settings.device):
            torch.manual_seed(0)
            model = build_model(method, settings, data)
            few = bags[: max(_TIMED_BAGS, settings.batch_size)]
            trainer = BagTrainer(model, few, way, accelerator=accelerator(settings.device))
            train = trainer.steps * way.batch_size / _seconds("trainer.epoch()", {"trainer": trainer}, threads)
            padded = [pad_bags([bag]).to(trainer.device) for bag in few]
            model.eval()
            with torch.no_grad():
                work = "[model(batch.x, batch.valid) for batch in padded]"
                infer = len(few) / _seconds(work, {"model": model, "padded": padded}, threads)
        costs = {"parameters": sum(p.numel() for p in model.parameters()), "train": train, "infer": infer}
        steps = way.epochs * (len(bags) // way.batch_size)
        return Measured(describe_machine(trainer.device, threads), costs, steps)

    def trial(self, trial: Trial, data: BagData) -> dict[str, float]:
        torch.manual_seed(draw("model", trial.seed))
        model = build_model(trial.method, trial.settings, data)
        way = recipe(trial.settings, data)
        steps = len(data.part("train")) // way.batch_size

        def note(epoch: int, loss: float, scores: BagScores | None) -> None:
            # Not named as the metric: the report takes that for the test data.
            reached = {} if scores is None else {"validation_auc": scores.auc}
            trial.curve = trial.curve.add(epoch * steps, loss=loss, **reached)
            trial.tell(epoch * steps, loss, f"validation AUC {reached['validation_auc']:.3f}" if reached else None)

        try:
            fit(
                model,
                data.part("train"),
                data.part("val"),
                way,
                seed=trial.seed,
                accelerator=accelerator(trial.device),
                on_epoch=note,
                checkpoint=trial.folder / "checkpoint-last" / "state.pt",
            )
        except FloatingPointError as error:
            raise TrainingFailed(str(error)) from error
        if is_leader():
            model.save_pretrained(trial.folder / "model")
        scores = evaluate(model, data.part("test"), instances=True)
        found = {metric.name: getattr(scores, metric.name) for metric in METRICS}
        return {name: value for name, value in found.items() if value is not None}

    def pictures(self, results: Results, folder: Path) -> dict[str, Any]:
        from heed.compare.tracks.slides.pictures import looks

        return {"looks": looks(results, folder / DATA, folder)}


def _seconds(work: str, names: dict[str, Any], threads: int) -> float:
    timer = Timer(work, globals=names, num_threads=threads)
    timer.timeit(1)
    return timer.blocked_autorange(min_run_time=_TIMED_SECONDS).median


TRACK = Slides()
