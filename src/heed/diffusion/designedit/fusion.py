"""What DesignEdit does to the latents between two steps: proximal guidance, blending, and the one-shot paste.

    d = eps_c - eps_u, thr = quantile(|d|, 0.75) over everything                                  d (R, C, h, w)
    eps = eps_u + g d;   edited = dilate(|d| > thr), background also M, canvas everywhere          at t < 400
    z <- z - 0.1 (z - x_stars[T - 1 - i]) (1 - edited)                                             at t < 400
    blend, k in blend_time:    z[1] = M z[1] + (1 - M) z[0]                                       M (1, 1, h, w)
    paste, one step later:     z[2] = z[1], then for each layer j: z[2] = (1 - m) z[2] + m s(z[3 + j]), m = s(M_j)

s shifts by whole latent cells and fills with 0; later layers lie above earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.diffusion.designedit.settings import DesignEditSettings
from heed.diffusion.pictures import check_fractions

SOURCE, BACKGROUND, CANVAS, FIRST_LAYER = range(4)


@provides("01-designedit")
def shift(x: Float[Tensor, "... h w"], dx: float = 0.0, dy: float = 0.0) -> Float[Tensor, "... h w"]:
    """Right by int(|dx| w) cells (left where dx < 0), up by int(|dy| h) cells (down where dy < 0), filled with 0.

    Raises:
        ValueError: |dx| or |dy| >= 1.
    """
    check_fractions("shift", dx, dy)
    height, width = x.shape[-2:]
    right, down = int(dx * width), int(-dy * height)
    # Negative padding cuts off.
    return F.pad(x, (right, -right, down, -down))


@provides("01-designedit")
class LayerFusion:
    """Blends the background with the source, then pastes the layers on the canvas.

    Args:
        remove: (1, 1, h, w) what the background may change.
        blend_steps: steps, from 1, after which it is blended; the layers are pasted after the step that follows.
        layers: (1, 1, h, w) masks, the lowest first; none for removal, zoom and pan.
        shifts: (dx, dy) of each layer, fractions of width and height, dy > 0 up.

    Raises:
        ValueError: layers and shifts of different number, or masks of different size.
    """

    def __init__(
        self,
        remove: Float[Tensor, "1 1 h w"],
        blend_steps: range,
        layers: Sequence[Float[Tensor, "1 1 h w"]] = (),
        shifts: Sequence[tuple[float, float]] = (),
    ) -> None:
        if len(layers) != len(shifts):
            raise ValueError(f"{len(layers)} layers need as many shifts, not {len(shifts)}")
        for i, mask in enumerate(layers):
            if mask.shape != remove.shape:
                raise ValueError(f"layer {i}: its mask is {tuple(mask.shape)}, the remove mask {tuple(remove.shape)}")
        self.remove, self.blend_steps = remove, blend_steps
        self.layers, self.shifts = tuple(layers), tuple(shifts)

    def __call__(self, latents: Float[Tensor, "R C h w"], step: int) -> Float[Tensor, "R C h w"]:
        """Rows after step number `step`, counted from 1; the given tensor is left alone."""
        rows = list(latents.split(1))
        if step in self.blend_steps:
            rows[BACKGROUND] = rows[BACKGROUND] * self.remove + rows[SOURCE] * (1 - self.remove)
        if self.layers and step == self.blend_steps.stop:
            rows[CANVAS] = self._pasted(rows)
        return torch.cat(rows)

    def _pasted(self, rows: list[Tensor]) -> Tensor:
        canvas = rows[BACKGROUND]
        for row, mask, (dx, dy) in zip(rows[FIRST_LAYER:], self.layers, self.shifts, strict=True):
            m = shift(mask, dx, dy)
            canvas = canvas * (1 - m) + shift(row, dx, dy) * m
        return canvas


@provides("01-designedit")
class ProximalGuidance:
    """Classifier-free guidance that knows where it edits, and pulls the rest towards the inverted latents.

    Args:
        settings: guidance_scale, prox, quantile, recon_t, recon_lr and dilate_radius.
        trajectory: (T + 1, R, C, h, w) inverted latents of each row.
        remove: (1, 1, h, w) what the background may change.
    """

    def __init__(
        self,
        settings: DesignEditSettings,
        trajectory: Float[Tensor, "T1 R C h w"],
        remove: Float[Tensor, "1 1 h w"],
    ) -> None:
        self.settings, self.trajectory, self.remove = settings, trajectory, remove
        self._edited = torch.zeros_like(trajectory[0])

    def guide(
        self, uncond: Float[Tensor, "R C h w"], cond: Float[Tensor, "R C h w"], timestep: int
    ) -> Float[Tensor, "R C h w"]:
        """Both predictions joined; remembers where they differ."""
        s = self.settings
        d = (cond - uncond).float()
        threshold = torch.quantile(d.abs(), s.quantile)
        far = d.abs() > threshold
        if timestep < s.recon_t:
            self._edited = F.max_pool2d(far.float(), 2 * s.dilate_radius + 1, 1, s.dilate_radius)
        if s.prox is not None:
            d = d * far - (d.sign() * far * threshold if s.prox == "l1" else 0)
        return uncond + s.guidance_scale * d

    def pull(self, latents: Float[Tensor, "R C h w"], step: int, timestep: int) -> Float[Tensor, "R C h w"]:
        """The latents after step `step`, counted from 0, with unedited places nearer to the inverted ones."""
        if timestep >= self.settings.recon_t:
            return latents
        edited = self._edited.clone()
        edited[BACKGROUND] = (edited[BACKGROUND] + self.remove[0]).clamp(0, 1)
        edited[CANVAS : CANVAS + 1] = 1  # where there is a canvas
        inverted = self.trajectory[-2 - step]
        return latents - self.settings.recon_lr * (latents - inverted) * (1 - edited)
