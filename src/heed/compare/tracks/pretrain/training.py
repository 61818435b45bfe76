"""A trial: pre-train, look at the frozen features, fine-tune.

TRIAL/
  checkpoint-STEP/       state of pre-training to go on from; fine-tuning is short and begins anew
  pretrained/            the pre-trained encoder, for heed.from_pretrained
  model/                 the fine-tuned classifier, for heed.from_pretrained
  pictures.safetensors   test images, and what the objective sees and makes of them, pixels from 0 to 1
"""

from __future__ import annotations

import dataclasses
import math

import safetensors.torch
import torch
from torch import Tensor

from heed.checkpoint import write_atomically
from heed.compare.machine import draw, is_leader
from heed.compare.results import Cost, Metric
from heed.compare.table import score_in_words
from heed.compare.tracks.classify.learner import ImageLearner
from heed.compare.tracks.pretrain.evaluate import frozen_scores
from heed.compare.tracks.pretrain.host import build_host, build_objective
from heed.compare.training import POINTS, Training
from heed.compare.trial import TrainingFailed
from heed.data.images import ImageData
from heed.pretrain.encoders import Encoder, encoder_for
from heed.pretrain.objective import Objective
from heed.vision.vit import ViT

FINETUNED = Metric("finetuned", "fine-tuned accuracy")
METRICS = (FINETUNED, Metric("probe", "linear probe"), Metric("knn", "k-NN"))
LOSS = Cost("loss", "loss", "pre-training loss")
SAMPLES = 6


class Pretrainer(ImageLearner):
    """An objective in training. Its randomness is torch's own, which every step seeds anew."""

    def __init__(self, *args, **options) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, **options)
        self.loss = lambda outcome, labels: outcome.loss  # the labels are not looked at


class PretrainTraining(Training):
    """The three parts of a trial."""

    def scores(self, data: ImageData) -> dict[str, float]:
        """Do them; returns accuracies by the names of `METRICS`."""
        trial, settings = self.trial, self.trial.settings
        torch.manual_seed(draw("model", trial.seed))
        model = build_host(settings, data)
        objective = build_objective(settings, trial.method, model)
        encoder = encoder_for(model) if objective is None else objective.encoder
        labelled = with_labels(data, settings.labels)
        learner = self._learner(model, labelled, data)
        if objective is not None:
            self._pretrain(objective, data)
            if is_leader():
                self._draw(objective.to(learner.device), learner, data)
        found = frozen_scores(encoder, learner, labelled, settings.neighbours)
        if is_leader():
            self._save(model, data, "pretrained")
        return {FINETUNED.name: self._finetune(model, encoder, labelled, data), **found}

    def _learner(self, model: ViT, labelled: ImageData, data: ImageData) -> ImageLearner:
        """Fine-tunes; normalises the images as all of them are distributed, however few are labelled."""
        settings = self.trial.settings
        steps = finetune_steps(labelled, settings.batch_size, settings.finetune_epochs)
        learner = ImageLearner(
            settings.recipe(settings.finetune_learning_rate), model, labelled, steps, self.trial.device
        )
        learner.mean, learner.std = (x.view(-1, 1, 1).to(learner.device) for x in data.statistics())
        return learner

    def _pretrain(self, objective: Objective, data: ImageData) -> None:
        settings = self.trial.settings
        recipe = settings.recipe(settings.learning_rate)
        learner = Pretrainer(recipe, objective, data, self.trial.steps, self.trial.device)
        self.trial.costs[LOSS.name] = self.learn(learner, goes_on=True)

    def _finetune(self, model: ViT, encoder: Encoder, labelled: ImageData, data: ImageData) -> float:
        trial, settings = self.trial, self.trial.settings
        encoder.requires_grad_(True)  # the positions too
        torch.manual_seed(draw("head", trial.seed))
        model.reset_classifier(len(data.classes))
        learner = self._learner(model, labelled, data)
        steps = finetune_steps(labelled, settings.batch_size, settings.finetune_epochs)
        points = {round(steps * (i + 1) / POINTS) for i in range(POINTS)}
        loss, counted, accuracy = 0.0, 0, 0.0
        for step in range(steps):
            loss += learner.step(trial.seed, step).item()
            counted += 1
            if not math.isfinite(loss):
                raise TrainingFailed(f"the fine-tuning loss became {loss} by step {step + 1} of {steps}")
            if step + 1 in points:
                accuracy = learner.accuracy()
                trial.curve = trial.curve.add(step + 1, loss=loss / counted, **{FINETUNED.name: accuracy})
                trial.tell(trial.steps, loss / counted, score_in_words(FINETUNED, accuracy))
                loss, counted = 0.0, 0
        if is_leader():
            self._save(model, data, "model")
        return accuracy

    def _save(self, model: ViT, data: ImageData, name: str) -> None:
        mean, std = data.statistics()
        model.pretrained_cfg = {"mean": mean.tolist(), "std": std.tolist()}
        model.save_pretrained(self.trial.folder / name)

    def _draw(self, objective: Objective, learner: ImageLearner, data: ImageData) -> None:
        images = learner.normalise(data.test_images[sample_indices(data)])
        generator = torch.Generator().manual_seed(draw("pictures"))
        objective.eval()
        seen = {"input": images, **objective.pictures(images, generator)}

        def pixels(x: Tensor) -> Tensor:
            return (x * learner.std + learner.mean).cpu().contiguous()

        content = safetensors.torch.save({name: pixels(x) for name, x in seen.items()})
        write_atomically(self.trial.folder / "pictures.safetensors", content)


def finetune_steps(labelled: ImageData, batch_size: int, epochs: int) -> int:
    """Optimiser steps of fine-tuning."""
    count = len(labelled.train_labels)
    return epochs * (count // min(batch_size, count))


def with_labels(data: ImageData, per_class: int | None) -> ImageData:
    """The data with so many training images per class, always the same; None for all there are."""
    if per_class is None:
        return data
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    labels = data.train_labels[order]
    chosen = torch.cat([order[labels == label][:per_class] for label in labels.unique()])
    images, labels = data.train_images[chosen], data.train_labels[chosen]
    return dataclasses.replace(data, train_images=images, train_labels=labels)


def sample_indices(data: ImageData) -> Tensor:
    """Test images of as many classes as there is room for."""
    first = [int(torch.nonzero(data.test_labels == label)[0]) for label in data.test_labels.unique()]
    rest = [i for i in range(len(data.test_labels)) if i not in set(first)]
    return torch.tensor((first + rest)[:SAMPLES])
