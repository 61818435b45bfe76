"""What every pre-training objective is: a loss on images without labels, around an encoder that is kept afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import load_rooms
from heed.pretrain.encoders import Encoder
from heed.registry import Registry


@dataclass(frozen=True)
class Outcome:
    """What an objective makes of a batch.

    Args:
        loss: scalar, to be differentiated.
        shown: what else is worth a look, by name, detached; e.g. "mask" (B, N) and "prediction".
    """

    loss: Float[Tensor, ""]
    shown: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """Base of the objectives; a subclass sets `encoder` and adds what it needs beside it.

    After pre-training, `objective.encoder.backbone` is the model to go on with.
    """

    encoder: Encoder

    @abstractmethod
    def forward(self, images: Float[Tensor, "B C H W"], generator: torch.Generator | None = None) -> Outcome:
        """The loss of a batch.

        Args:
            images: (B, C, H, W).
            generator: source of all randomness of the objective; None for torch's own.
        """

    @abstractmethod
    def pictures(
        self, images: Float[Tensor, "B C H W"], generator: torch.Generator | None = None
    ) -> dict[str, Float[Tensor, "B C H W"]]:
        """What the objective sees and makes of images, as images by name; NaN where there is nothing to be seen."""


# name -> factory(model, **options) giving an Objective around a model that `encoder_for` knows. The options are those
# of the objective; a factory chooses a small decoder where none is given, as for a small encoder.
objectives: Registry[Callable[..., Objective]] = Registry("objective", load_rooms)
