"""Key masking: the background row attends to keys that are blanked under the mask, so that it forgets what is there.

    K <- (1 - m) K                               K (heads, N, d) of one row, m (N,) the mask at the layer's size
    out = softmax(Q K^T / sqrt(d)) V

A blanked key has logit 0 and still takes part (weight exp 0); it is not set to minus infinity. Only the conditional half
of the row is masked, so guidance amplifies exactly what the mask does. (1 - m) multiplies the projected keys: the same as
the authors' masking before the projection, and also right where the projection has a bias.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.diffusion.denoise import Position
from heed.diffusion.masks import binarised
from heed.diffusion.processors import StepWindowProcessor, layer_grid, resized_mask


@provides("01-designedit")
class KeyMaskedAttnProcessor(StepWindowProcessor):
    """diffusers processor that blanks the keys of one row inside a mask, in a window of steps.

    Args:
        position: of the denoising loop.
        row: the row of the doubled batch; with n rows the conditional background is n + 1.
        mask: (1, 1, h, w) at latent resolution; counts as 1 where it is above 0, and is soft after the resize only.
        steps: denoising steps, from 0, at which keys are blanked.
        refine: (1, 1, h, w) added to the mask at `refine_steps`, to suppress artifacts.
        refine_steps: where the refine mask counts.
        grid: height and width of the latents; None where tokens form squares.

    Raises:
        ValueError: a mask that is not (1, 1, h, w), or a refine mask of another size; when called, tokens that fit no
            grid.
    """

    def __init__(
        self,
        position: Position,
        row: int,
        mask: Float[Tensor, "1 1 h w"],
        steps: range,
        refine: Float[Tensor, "1 1 h w"] | None = None,
        refine_steps: range = range(0),
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(position, steps)
        if mask.ndim != 4 or mask.shape[:2] != (1, 1):
            raise ValueError(f"mask must be (1, 1, height, width), not {tuple(mask.shape)}")
        if refine is not None and refine.shape != mask.shape:
            raise ValueError(f"refine is {tuple(refine.shape)}, the mask {tuple(mask.shape)}: one size is needed")
        self.row, self.grid = row, grid
        self.mask = binarised(mask)
        self.refined = self.mask if refine is None else binarised(mask + refine)
        self.refine_steps = refine_steps
        self._kept: dict[tuple[int, bool], Tensor] = {}

    def change(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.row in self.position.rows:
            at = self.position.rows.index(self.row)
            k = torch.cat([k[:at], k[at : at + 1] * self.kept(k), k[at + 1 :]])
        return q, k, v

    def kept(self, k: Tensor) -> Float[Tensor, "N 1"]:
        """1 - m at the size of a layer with keys (B, heads, N, d)."""
        refined = self.position.step in self.refine_steps
        which = (k.shape[2], refined)
        if which not in self._kept:
            mask = self.refined if refined else self.mask
            m = resized_mask(mask, layer_grid(k.shape[2], self.grid))
            self._kept[which] = (1 - m).flatten()[:, None]
        return self._kept[which].to(k)
