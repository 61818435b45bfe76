"""How the models are trained: Adafactor without momentum, a constant rate and then 1 / sqrt(step), and cut texts.

    lr_t = 0.01 sqrt(warmup / max(t, warmup)), times the size of each parameter; second moments with decay 1 - t^-0.8

Roy et al., arXiv 2003.05997, after Shazeer & Stern, "Adafactor", ICML 2018, arXiv 1804.04235. Cutting texts at random is
the PyTorch package's: models that always saw full texts do badly on short ones.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import Adafactor
from torch.optim.lr_scheduler import LambdaLR

from heed.catalogue import provides


@provides("08-routing")
def adafactor(
    model: nn.Module, *, constant: float = 0.01, warmup: int = 10_000, weight_decay: float = 0.0
) -> tuple[Adafactor, LambdaLR]:
    """The authors' optimiser and schedule, which is called once per step.

    Args:
        model: its parameters that have gradients; centroids of moving averages have none.
        constant: the rate until `warmup` steps.
        warmup: after these, the rate falls as 1 / sqrt(step).
        weight_decay: 2e-5 for WikiText-103.
    """
    if warmup < 1:
        raise ValueError(f"warmup={warmup} must be at least 1 step")
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = Adafactor(learning, lr=constant, beta2_decay=-0.8, d=1.0, weight_decay=weight_decay)
    return optimizer, LambdaLR(optimizer, lambda step: (warmup / max(step, warmup)) ** 0.5)


@provides("08-routing")
def cut_randomly(ids: Int[Tensor, "B T"], least: int, generator: torch.Generator | None = None) -> Int[Tensor, "B N"]:
    """The first ids of each text, as many as chance has it, from `least` to all.

    Raises:
        ValueError: texts shorter than `least`.
    """
    if not 1 <= least <= ids.shape[1]:
        raise ValueError(f"least={least} must lie in 1 .. {ids.shape[1]}, the length of the texts")
    return ids[:, : int(torch.randint(least, ids.shape[1] + 1, (), generator=generator))]
