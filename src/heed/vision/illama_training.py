"""How iLLaMA is trained (card 07): the schedule of its soft mask, and the authors' settings.

    r(step) falls from 1 to 0 until the cutoff epoch and stays there: a mask that closes early in training

Wang et al., "Adapting LLaMA Decoder to Vision Transformer", 2024 (arXiv 2404.06773). The model is in `heed.vision.illama`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.errors import unknown
from heed.vision.illama import ILlama, SoftMask


@provides("07-illama")
def soft_mask_rates(
    epochs: int,
    steps_per_epoch: int,
    rate: float = 1.0,
    *,
    cutoff_epoch: int = 0,
    decay: str = "linear",
    mode: str = "soft",
) -> Float[Tensor, " steps"]:
    """The soft mask rate of every training step.

    Args:
        epochs, steps_per_epoch: length of the training.
        rate: to begin with, in [0, 1].
        cutoff_epoch: the epoch from which on the rate is 0 in mode "soft".
        decay: how it gets there: "linear", or "constant" and then a drop.
        mode: "soft", or "standard" for the same rate throughout.
    """
    SoftMask(rate)
    if mode not in ("soft", "standard"):
        raise ValueError(unknown("mode", mode, ("soft", "standard")))
    if decay not in ("linear", "constant"):
        raise ValueError(unknown("decay", decay, ("linear", "constant")))
    if not 0 <= cutoff_epoch <= epochs:
        raise ValueError(f"cutoff_epoch={cutoff_epoch} must lie in [0, epochs={epochs}]")
    if mode == "standard":
        return torch.full((epochs * steps_per_epoch,), float(rate))
    rates, soft = torch.zeros(epochs * steps_per_epoch), cutoff_epoch * steps_per_epoch
    rates[:soft] = torch.linspace(rate, 0, soft) if decay == "linear" else rate
    return rates


@provides("07-illama")
class SoftMaskSchedule:
    """Sets a model's soft mask rate for every training step, like a learning-rate schedule of PyTorch.

    Made before the first step, it sets the first rate; `step()` after each training step sets the next.

    Args:
        model: an `ILlama`.
        rates: one per step, from `soft_mask_rates`; the last one stays.
    """

    def __init__(self, model: ILlama, rates: Tensor) -> None:
        self.model = model
        self.rates = rates.tolist()
        self.steps = 0
        model.set_soft_mask(self.rates[0])

    def step(self) -> None:
        self.steps = min(self.steps + 1, len(self.rates) - 1)
        self.model.set_soft_mask(self.rates[self.steps])


_RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {"mixup": 0.1, "cutmix": 0.1, "drop_path": 0.0, "warmup_epochs": 5},
    "small": {"mixup": 0.5, "cutmix": 0.5, "drop_path": 0.1},
    "base": {"mixup": 0.95, "cutmix": 1.0, "drop_path": 0.4},
}
_MASKS: dict[str, dict[str, Any]] = {
    "tiny": {"cutoff_epoch": 50, "decay": "constant"},
    "small": {"cutoff_epoch": 50, "decay": "linear"},
    "base": {"cutoff_epoch": 25, "decay": "linear"},
}


@provides("07-illama")
def training_recipe(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the authors train on ImageNet: options of timm's training script, and those of `soft_mask_rates`.

    Args:
        name: "illama_tiny", "illama_small" or "illama_base".
    """
    size = re.sub(r"^illama_", "", name)
    if size not in _RECIPES:
        raise ValueError(unknown("recipe", name, (f"illama_{known}" for known in _RECIPES)))
    common = {"epochs": 300, "batch_size": 4096, "opt": "adamw", "lr": 4e-3, "weight_decay": 0.05}
    return common | _RECIPES[size], {"epochs": 300, "rate": 1.0} | _MASKS[size]
