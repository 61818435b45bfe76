"""Which dilations the layers of DiNAT have (card 58), and how far a stack of them sees.

Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv 2209.15001. The models are in `heed.vision.nat`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from heed.catalogue import provides
from heed.engine.patterns import Neighborhood

Dilations = tuple[tuple[int, ...], ...]  # per level, one per layer


@provides("58-dinat")
def alternating_dilations(
    img_size: int, kernel_size: int = 7, depths: Sequence[int] = (3, 4, 18, 5), stem_stride: int = 4
) -> Dilations:
    """The authors' rule: 1 and floor(side of the map / kernel_size) in turns, per level.

    Args:
        img_size: side of the images in pixels.
        kernel_size: side of the windows in tokens.
        depths: layers per level.
        stem_stride: pixels per token of the first level.

    Returns:
        Per level one dilation per layer; with windows of 7, the larger ones are 8, 4, 2, 1 at 224 pixels and
        13, 6, 3, 1 at 384.
    """
    wide = [max(1, -(-img_size // (stem_stride * 2**level)) // kernel_size) for level in range(len(depths))]
    return tuple(tuple(w if i % 2 else 1 for i in range(depth)) for w, depth in zip(wide, depths, strict=True))


# The authors' dilations for dense tasks, for depths 3, 4, 18, 5 and windows of 7 (mask2former: 11); the weights stay.
# For a level of fewer layers take its first entries.
DENSE_DILATIONS: dict[str, Dilations] = {
    "coco": ((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7) * 3, (1, 3, 1, 3, 1)),
    "upernet_512": ((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4) * 3, (1, 2, 1, 2, 1)),
    "upernet_640": (
        (1, 20, 1),
        (1, 5, 1, 10),
        (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5),
        (1, 2, 1, 2, 1),
    ),
    "mask2former": ((1, 14, 1), (1, 4, 1, 7), (1, 2, 1, 3) * 4 + (1, 3), (1, 1, 1, 1, 1)),
}


@provides("58-dinat")
def receptive_field(side: int, kernel_size: int, dilations: Sequence[int]) -> Bool[Tensor, "side side"]:
    """Which tokens of an axis reach which through a stack of layers, borders and padding included.

    A window on a map is the product of its axes, so the share of a square map that an output sees is the square of the
    share along an axis.

    Args:
        side: tokens along the axis.
        kernel_size: window in tokens.
        dilations: one per layer, first layer first.

    Returns:
        (side, side): True at [i, j] where the output i depends on the input j.
    """
    reach = torch.eye(side)
    for dilation in dilations:
        length = max(side, kernel_size * dilation)
        window = Neighborhood(length, kernel_size, dilation).mask(length)[:side, :side]
        reach = ((window.float() @ reach) > 0).float()
    return reach.bool()
