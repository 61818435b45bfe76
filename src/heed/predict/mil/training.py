"""Training classifiers of bags as the authors of ACMIL do (card 09), and judging them.

lr = 0.5 lr_0 (1 + cos(pi e / epochs)),  e = epoch + iteration / iterations of an epoch, set before every step
kept: the weights of the epoch with the largest F1 + AUC on the validation bags
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import write_atomically
from heed.data.bags import Bag, pad_bags
from heed.errors import MissingExtra, unknown
from heed.predict.mil.model import BagModel
from heed.predict.mil.output import BagOutput

CHECKPOINT_SECONDS = 60.0  # the longest that training goes on without a checkpoint, but for one epoch
_F1 = ("micro", "macro")


@provides("09-acmil")
@dataclass(frozen=True)
class BagRecipe:
    """How a classifier of bags is trained.

    Args:
        epochs: passes over the training bags.
        learning_rate: at the start of the cosine.
        weight_decay: of AdamW.
        batch_size: bags per step; an incomplete last batch is left out.
    """

    epochs: int = 100
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@provides("09-acmil")
def cosine_learning_rate(base: float, progress: float, epochs: int) -> float:
    """The learning rate at `progress`, in epochs: `base` at 0, and 0 at `epochs`."""
    return 0.5 * base * (1 + math.cos(math.pi * progress / epochs))


@provides("09-acmil")
@dataclass(frozen=True)
class BagScores:
    """How well bags are classified.

    Args:
        auc: area under the ROC curve, one class against the rest, mean over classes.
        f1: mean over classes (macro).
        accuracy: share of the bags; with one label each this is also the micro F1.
        instance_auc: area under the ROC curve of the attention over the instances of a bag, mean over the bags that hold
            instances of both kinds; None where that was not asked for or is not known.
    """

    auc: float
    f1: float
    accuracy: float
    instance_auc: float | None = None

    def for_choosing(self, f1: str = "micro") -> float:
        """F1 + AUC, by which the best epoch is chosen; the authors' F1 is the micro average."""
        if f1 not in _F1:
            raise ValueError(unknown("f1", f1, _F1))
        return self.auc + (self.accuracy if f1 == "micro" else self.f1)


@provides("09-acmil")
class BestCheckpoint:
    """Keeps the weights of the best epoch; of equals the first.

    Args:
        f1: "micro", as the authors', or "macro".
    """

    def __init__(self, f1: str = "micro") -> None:
        self.f1 = f1
        self.epoch: int | None = None
        self.scores: BagScores | None = None
        self.weights: dict[str, Tensor] = {}

    def update(self, epoch: int, scores: BagScores, model: nn.Module) -> bool:
        """Look at an epoch; returns whether it is the best so far."""
        if self.scores is not None and scores.for_choosing(self.f1) <= self.scores.for_choosing(self.f1):
            return False
        self.epoch, self.scores = epoch, scores
        self.weights = copy.deepcopy(model.state_dict())
        return True

    def restore(self, model: nn.Module) -> None:
        """Give a model the best weights; nothing where no epoch was looked at."""
        if self.weights:
            model.load_state_dict(self.weights)


@provides("09-acmil")
class BagTrainer:
    """A model in training.

    What happens in an epoch depends on the seed and the epoch's number alone.

    Args:
        model: moved to the accelerator's device, where there is one.
        bags: to learn from.
        recipe: how.
        seed: of the order of the bags, of masking and dropout.
        accelerator: of `accelerate`; None trains where the model is.

    Raises:
        ValueError: there are fewer bags than a batch holds, or a batch cannot be shared out among processes.
    """

    def __init__(
        self, model: BagModel, bags: Sequence[Bag], recipe: BagRecipe, *, seed: int = 0, accelerator: Any = None
    ) -> None:
        if len(bags) < recipe.batch_size:
            raise ValueError(f"batch_size={recipe.batch_size} is more than the {len(bags)} training bags; lower it")
        self.model, self.bags, self.recipe, self.seed = model, bags, recipe, seed
        self.done = 0
        self.steps = len(bags) // recipe.batch_size  # of an epoch
        fused = accelerator is None or accelerator.device.type != "mps"
        if accelerator is not None:
            model.to(accelerator.device)
        optimizer = torch.optim.AdamW(
            model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, fused=fused
        )
        self.rank, self._processes, self._backward = 0, 1, Tensor.backward
        self._wrapped: nn.Module = model
        self.optimizer: Any = optimizer
        if accelerator is not None:
            self.rank, self._processes = accelerator.process_index, accelerator.num_processes
            self._wrapped, self.optimizer = accelerator.prepare(model, optimizer)
            self._backward = accelerator.backward
        if recipe.batch_size % self._processes:
            raise ValueError(
                f"batch_size={recipe.batch_size} cannot be shared out among {self._processes} processes; give a multiple"
            )
        self.device = next(model.parameters()).device

    def epoch(self) -> float:
        """Do one pass over the bags; returns the mean loss."""
        size, total = self.recipe.batch_size, torch.zeros((), device=self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_003 * self.seed + self.done)
            order = torch.randperm(len(self.bags)).tolist()
            torch.manual_seed(1_000_003 * self.seed + self.done + 500_000_003 * (1 + self.rank))
            self._wrapped.train()
            for i in range(self.steps):
                self._set_learning_rate(self.done + i / self.steps)
                chosen = order[i * size : (i + 1) * size][self.rank :: self._processes]
                batch = pad_bags([self.bags[j] for j in chosen]).to(self.device)
                loss = self.model.losses(self._wrapped(batch.x, batch.valid), batch.labels).total
                self.optimizer.zero_grad()
                self._backward(loss)
                self.optimizer.step()
                total += loss.detach()
        self.done += 1
        return total.item() / self.steps

    def _set_learning_rate(self, progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = cosine_learning_rate(self.recipe.learning_rate, progress, self.recipe.epochs)


@provides("09-acmil")
def fit(
    model: BagModel,
    train: Sequence[Bag],
    validation: Sequence[Bag],
    recipe: BagRecipe | None = None,
    *,
    seed: int = 0,
    accelerator: Any = None,
    on_epoch: Callable[[int, float, BagScores | None], object] | None = None,
    checkpoint: Path | None = None,
) -> BestCheckpoint:
    """Train a model and leave it with the weights of its best epoch, in eval mode.

    Args:
        model: what to train, in place.
        train, validation: bags; without any for validation the last epoch is kept.
        recipe: how; the authors' by default.
        seed, accelerator: see `BagTrainer`.
        on_epoch: told of every epoch's number from 1, training loss and validation scores.
        checkpoint: file where the state is kept about once a minute; training goes on from it, bit for bit, and tells
            `on_epoch` of the epochs that are done.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    recipe = recipe or BagRecipe()
    trainer, best = BagTrainer(model, train, recipe, seed=seed, accelerator=accelerator), BestCheckpoint()
    past: list[tuple[float, BagScores | None]] = []
    if checkpoint is not None and checkpoint.is_file():
        past = _resume(checkpoint, trainer, best)
    saved = time.monotonic()
    for epoch in range(1, recipe.epochs + 1):
        if epoch > len(past):
            past.append((trainer.epoch(), evaluate(model, validation) if validation else None))
            loss, scores = past[-1]
            if not math.isfinite(loss):
                raise FloatingPointError(f"the training loss became {loss} in epoch {epoch} of {recipe.epochs}")
            if scores is not None:
                best.update(epoch, scores, model)
            if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                _save(checkpoint, trainer, best, past)
                saved = time.monotonic()
        if on_epoch is not None:
            on_epoch(epoch, *past[epoch - 1])
    best.restore(model)
    model.eval()
    return best


def _save(
    path: Path, trainer: BagTrainer, best: BestCheckpoint, past: Sequence[tuple[float, BagScores | None]]
) -> None:
    """Write what `_resume` reads: plain values and tensors, whole or not at all."""
    state = {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "best": {"epoch": best.epoch, "weights": best.weights},
        "past": [(loss, None if scores is None else dataclasses.asdict(scores)) for loss, scores in past],
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    if trainer.rank == 0:
        write_atomically(path, buffer.getvalue())


def _resume(path: Path, trainer: BagTrainer, best: BestCheckpoint) -> list[tuple[float, BagScores | None]]:
    """Put a trainer and the best epoch back where `_save` found them; returns the losses and scores until then."""
    state = torch.load(path, map_location=trainer.device, weights_only=True)
    trainer.model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    past = [(loss, None if scores is None else BagScores(**scores)) for loss, scores in state["past"]]
    trainer.done = len(past)
    best.epoch, best.weights = state["best"]["epoch"], state["best"]["weights"]
    best.scores = None if best.epoch is None else past[best.epoch - 1][1]
    return past


@provides("09-acmil")
def predict(model: BagModel, bag: Bag) -> BagOutput:
    """What a model says about one bag, in eval mode and without gradients."""
    training = model.training
    device = next(model.parameters()).device
    with torch.no_grad():
        output = model.eval()(bag.instances().features.to(device))
    model.train(training)
    return output


@provides("09-acmil")
def evaluate(model: BagModel, bags: Sequence[Bag], *, instances: bool = False) -> BagScores:
    """Scores over bags, one at a time, through torchmetrics.

    Args:
        model: in either mode; judged in eval mode.
        bags: with their labels.
        instances: also judge how well attention finds the instances of label 1 in the bags that know some, as the mean
            over such bags.

    Raises:
        MissingExtra: torchmetrics is not installed.
        ValueError: no bags.
    """
    try:
        from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score
    except ImportError as error:
        raise MissingExtra("torchmetrics", "compare") from error
    if not bags:
        raise ValueError("no bags to evaluate on; give at least one")
    outputs = [predict(model, bag) for bag in bags]
    shares = torch.cat([output.logits.softmax(-1).cpu() for output in outputs])
    labels = torch.tensor([bag.label for bag in bags])
    classes = shares.shape[1]
    found: list[Tensor] = []
    for bag, output in zip(bags, outputs, strict=True):
        truth = bag.instances().labels if instances else None
        if truth is not None and 0 < truth.sum() < len(truth):
            found.append(BinaryAUROC()(output.weights[0].mean((0, 1)).cpu(), truth))
    return BagScores(
        auc=float(MulticlassAUROC(classes, average="macro")(shares, labels)),
        f1=float(MulticlassF1Score(classes, average="macro")(shares, labels)),
        accuracy=float(MulticlassAccuracy(classes, average="micro")(shares, labels)),
        instance_auc=float(torch.stack(found).mean()) if found else None,
    )
