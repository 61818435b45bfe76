"""A model in training: its optimiser, schedule, device and precision, and what is saved to go on from.

A track's own learner adds the batches. What happens at step t should depend on the seed and on t alone, so that a trial
that is taken up again at t goes on bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from heed.compare.machine import accelerator

CLIP = 1.0  # largest norm of the gradient
_WARM_UP = 0.2  # share of the steps over which the learning rate rises


class Learner:
    """AdamW with a one-cycle schedule, through `accelerate`.

    Args:
        model: moved to the device.
        steps: length of the schedule.
        learning_rate: its peak.
        weight_decay: of everything but vectors.
        device: "auto", "cpu", "cuda:1", ...
        precision: "fp32", "bf16" or "fp16" (mixed).
    """

    def __init__(
        self, model: nn.Module, steps: int, *, learning_rate: float, weight_decay: float, device: str, precision: str
    ) -> None:
        self.accelerator = accelerator(device, precision)
        self.device: torch.device = self.accelerator.device
        groups = param_groups_weight_decay(model, weight_decay)
        model, self.optimizer = self.accelerator.prepare(
            model.to(self.device), torch.optim.AdamW(groups, learning_rate, fused=self.device.type != "mps")
        )
        self.model: nn.Module = model
        # Kept out of `prepare`, which would count one step per process.
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer.optimizer,
            learning_rate,
            total_steps=max(steps, 3),
            pct_start=max(_WARM_UP, 2 / max(steps, 3)),  # a rise or fall of no length divides by zero
            cycle_momentum=False,
        )
        self.accelerator.register_for_checkpointing(self.schedule)

    def step(self, seed: int, step: int) -> Float[Tensor, ""]:
        """Do optimiser step number `step`; returns its loss."""
        raise NotImplementedError

    def descend(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """One step of optimiser and schedule down the gradient of a loss, which is returned detached."""
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def bare_model(self) -> nn.Module:
        """The model without the wrappers of `accelerate`."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def save(self, folder: Path) -> None:
        """Write model, optimiser and schedule into a folder; all processes must call this."""
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.accelerator.load_state(str(folder))
