"""One optimiser step, and one look at the test images: what every method goes through alike, on any device.

What happens at step t depends on the seed and on t alone: batches and augmentation are drawn from generators seeded
anew at every step, so a trial that is taken up again at t goes on bit for bit, and all methods see the same images.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torchvision.transforms import v2

from heed.compare.learner import Learner
from heed.compare.machine import draw
from heed.compare.tracks.classify.settings import ClassifySettings
from heed.data.images import ImageData
from heed.errors import MissingExtra

GROUP = 8  # images that share one draw of the augmentation
LABEL_SMOOTHING = 0.05


def batch_size(settings: ClassifySettings, data: ImageData) -> int:
    """Images per step: as set, or all there are."""
    return min(settings.batch_size, len(data.train_labels))


class ImageLearner(Learner):
    """A classifier of images in training.

    Args:
        settings: recipe.
        model: (B, C, S, S) to (B, classes); moved to the device.
        data: what it learns from.
        steps: length of the learning-rate schedule.
        device: overrides the settings' device.
    """

    def __init__(
        self, settings: ClassifySettings, model: nn.Module, data: ImageData, steps: int, device: str | None = None
    ) -> None:
        super().__init__(
            model,
            steps,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            device=device or settings.device,
            precision=settings.precision,
        )
        self.data = data
        self.batch = batch_size(settings, data)
        self.loss = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
        self.mean, self.std = (x.view(-1, 1, 1).to(self.device) for x in data.statistics())
        self.augment = _augmentation(settings.augment, data.side)

    def batch_at(self, seed: int, step: int) -> tuple[UInt8[Tensor, "B C S S"], Int64[Tensor, " B"]]:
        """The training images and labels of a step; this process's share of them."""
        epoch, position = divmod(step, len(self.data.train_labels) // self.batch)
        shuffle = torch.Generator().manual_seed(draw("order", seed, epoch))
        order = torch.randperm(len(self.data.train_labels), generator=shuffle)
        chosen = order[position * self.batch : (position + 1) * self.batch]
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        return self.data.train_images[mine].to(self.device), self.data.train_labels[mine].to(self.device)

    def normalise(self, images: UInt8[Tensor, "B C S S"]) -> Float[Tensor, "B C S S"]:
        """Bytes to what the models see: training pixels have mean 0 and deviation 1 per channel."""
        return (images.to(self.device).float() / 255 - self.mean) / self.std

    def step(self, seed: int, step: int) -> Float[Tensor, ""]:
        """Do optimiser step number `step`; returns its loss."""
        images, labels = self.batch_at(seed, step)
        torch.manual_seed(draw("step", seed, step, self.accelerator.process_index))
        images = torch.cat([self.augment(group) for group in images.split(GROUP)])
        self.model.train()
        loss = self.loss(self.model(self.normalise(images)), labels)
        return self.descend(loss)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the test images the model gets right, over all processes."""
        try:
            from torchmetrics.classification import MulticlassAccuracy
        except ImportError as error:
            raise MissingExtra("torchmetrics", "compare") from error
        metric = MulticlassAccuracy(len(self.data.classes), average="micro").to(self.device)
        first, stride = self.accelerator.process_index, self.accelerator.num_processes
        images, labels = self.data.test_images[first::stride], self.data.test_labels[first::stride]
        self.model.eval()
        for part, truth in zip(images.split(self.batch), labels.split(self.batch), strict=True):
            metric.update(self.model(self.normalise(part)), truth.to(self.device))
        return float(metric.compute())


def _augmentation(kind: str, side: int) -> nn.Module:
    padding = side // 14  # nothing for the smallest images, where one pixel is a large shift
    steps: list[nn.Module] = [v2.RandomCrop(side, padding=padding)] if kind != "none" and padding else []
    if kind == "flip":
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps) if steps else nn.Identity()
