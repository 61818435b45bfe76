"""Training on bytes: batches, one optimiser step, and the score on the test text.

A test byte is scored once, with at least half a context before it: windows of the test text overlap by half, and the
second half of each counts. What happens at step t depends on the seed and on t alone, and all methods see the same bytes.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from heed.compare.learner import Learner
from heed.compare.machine import draw
from heed.compare.tracks.language.models import TextModel
from heed.compare.tracks.language.settings import LanguageSettings
from heed.data.text import TextData

TESTED = 256  # windows at most, spread over the test text


class TextLearner(Learner):
    """A language model of bytes in training.

    Args:
        settings: recipe.
        model: gives losses of bytes; moved to the device.
        data: what it learns from.
        steps: length of the learning-rate schedule.
        device: overrides the settings' device.
    """

    def __init__(
        self, settings: LanguageSettings, model: TextModel, data: TextData, steps: int, device: str | None = None
    ) -> None:
        super().__init__(
            model,
            steps,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            device=device or settings.device,
            precision=settings.precision,
        )
        self.steps = steps
        self.data, self.context, self.batch = data, settings.context, settings.batch_size
        windows = data.test.unfold(0, self.context + 1, self.context // 2)
        self.test = windows[:: math.ceil(len(windows) / TESTED)]

    def batch_at(self, seed: int, step: int) -> Int64[Tensor, "B N"]:
        """The text of a step, N = context + 1; this process's share of it."""
        generator = torch.Generator().manual_seed(draw("text", seed, step))
        starts = torch.randint(len(self.data.train) - self.context, (self.batch,), generator=generator)
        mine = starts[self.accelerator.process_index :: self.accelerator.num_processes]
        return self.data.train[mine[:, None] + torch.arange(self.context + 1)].long().to(self.device)

    def step(self, seed: int, step: int) -> Float[Tensor, ""]:
        ids = self.batch_at(seed, step)
        torch.manual_seed(draw("step", seed, step, self.accelerator.process_index))
        self.model.train()
        cast(TextModel, self.bare_model()).at(step / self.steps)
        losses, extra = self.model(ids)
        return self.descend(losses.nanmean() + extra)

    @torch.no_grad()
    def by_position(self) -> Float[Tensor, " N"]:
        """Bits per byte of the test text at every place in the context; NaN where the model predicts nothing."""
        self.model.eval()
        first, stride = self.accelerator.process_index, self.accelerator.num_processes
        losses = [self.model(part.long().to(self.device))[0] for part in self.test[first::stride].split(self.batch)]
        mine = torch.cat(losses).double()
        total, count = (self.accelerator.reduce(x, "sum") for x in (mine.sum(0), torch.full_like(mine[0], len(mine))))
        return total / count / math.log(2)

    def bits(self) -> float:
        """Bits per byte of the test text."""
        return self.by_position()[self.context // 2 :].mean().item()
