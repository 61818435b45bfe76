"""How FFNet is trained on ImageNet-1K (card 53): the distillation loss, and the authors' settings.

    loss = (1 - alpha) CE(student, label) + alpha D                        student, teacher (B, K)
    hard:  D = CE(student, argmax teacher)
    soft:  D = tau^2 / (B K) sum p_t (log p_t - log p_s),   p = softmax(logits / tau)

Yun, Lee, Ro, 2024, arXiv 2406.02021; the loss follows Touvron et al., ICML 2021, arXiv 2012.12877. The authors' teacher is
RegNetY-160, timm's "regnety_160.deit_in1k".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown

_KINDS = ("hard", "soft")


@provides("53-metamixer")
class DistillationLoss(nn.Module):
    """What the labels and a teacher say about a student's logits.

    Args:
        teacher: images to logits; gets no gradient. Put it into eval mode.
        criterion: (logits, labels) -> loss, default cross-entropy. With mixup use one for soft labels.
        kind: "hard" or "soft".
        alpha: share of the teacher's part, in [0, 1].
        temperature: tau of the soft kind.
    """

    def __init__(
        self,
        teacher: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        *,
        kind: str = "hard",
        alpha: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if kind not in _KINDS:
            raise ValueError(unknown("kind of distillation", kind, _KINDS))
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be in [0, 1]")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive")
        self.teacher = teacher
        self.criterion = criterion
        self.kind = kind
        self.alpha = alpha
        self.temperature = temperature

    def forward(self, images: Float[Tensor, "B ..."], logits: Float[Tensor, "B K"], labels: Tensor) -> Tensor:
        """The loss of the student's `logits` for `images`; `labels` are what the criterion takes."""
        with torch.no_grad():
            wanted = self.teacher(images)
        if wanted.shape != logits.shape:
            raise ValueError(f"the teacher gives logits {tuple(wanted.shape)}, the student {tuple(logits.shape)}")
        if self.kind == "hard":
            taught = F.cross_entropy(logits, wanted.argmax(1))
        else:
            tau = self.temperature
            ours, theirs = F.log_softmax(logits / tau, 1), F.log_softmax(wanted / tau, 1)
            taught = F.kl_div(ours, theirs, reduction="sum", log_target=True) * tau**2 / logits.numel()
        return (1 - self.alpha) * self.criterion(logits, labels) + self.alpha * taught


_RECIPE = {
    "opt": "adamw",
    "lr": 1e-3,
    "total_batch_size": 1024,
    "weight_decay": 0.05,
    "epochs": 300,
    "sched": "cosine",
    "min_lr": 1e-5,
    "warmup_epochs": 5,
    "cooldown_epochs": 20,
    "model_ema_decay": 0.9995,
    "aa": "rand-m9-mstd0.5-inc1",
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "reprob": 0.25,
}
_FINE_TUNING = _RECIPE | {
    "img_size": 384,
    "lr": 5e-6,
    "min_lr": 5e-6,
    "weight_decay": 1e-8,
    "epochs": 30,
    "warmup_epochs": 0,
    "cooldown_epochs": 0,
}
# Stochastic depth from scratch, and with distillation; of the fine-tuning at 384 pixels.
_DROP_PATH = {"ffnet_1": (0.1, 0.02), "ffnet_2": (0.15, 0.08), "ffnet_3": (0.35, 0.2)}
_DROP_PATH_384 = {"ffnet_3": 0.4, "ffnet_4": 0.5}


@provides("53-metamixer")
def ffnet_recipe(name: str, *, distilled: bool = False, fine_tune: bool = False) -> dict[str, str | int | float]:
    """How the authors trained a model, under the names of timm's training script and of `FFNetConfig`.

    The learning rate belongs to total_batch_size, the images per step over all GPUs, and is constant in fine-tuning.

    Args:
        name: "ffnet_1" to "ffnet_3" from scratch, "ffnet_3" and "ffnet_4" for fine-tuning.
        distilled: with `DistillationLoss`.
        fine_tune: of a trained model, on images of 384 pixels.

    Raises:
        ValueError: a model that was not trained so.
    """
    if fine_tune:
        if name not in _DROP_PATH_384:
            raise ValueError(unknown("model with a recipe for fine-tuning", name, _DROP_PATH_384))
        return _FINE_TUNING | {"drop_path": _DROP_PATH_384[name], "crop_pct": 0.95}
    if name not in _DROP_PATH:
        raise ValueError(unknown("model with a recipe", name, _DROP_PATH))
    small = name != "ffnet_3"
    recipe = _RECIPE | {"drop_path": _DROP_PATH[name][distilled], "crop_pct": 0.9 if small else 0.95}
    return recipe | {"mixup": 0.2} if small and not distilled else recipe
