"""The numbers of DesignEdit: steps, guidance, the windows of its mechanisms, how far masks grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from heed.catalogue import provides

_AUTHORS_STEPS = 50
Window = tuple[int, int]


@provides("01-designedit")
@dataclass(frozen=True)
class DesignEditSettings:
    """Defaults are the authors'. Windows left at None are theirs at 50 steps and in proportion at others (heed's choice).

    Args:
        steps: T, of the inversion and of the edit.
        guidance_scale: g in eps_u + g (eps_c - eps_u).
        mask_time: keys are blanked at steps c, counted from 0, with first < c < last; None for (0, 40).
        blend_time: the background is blended with the source after steps k, counted from 1, with first <= k <= last;
            layers are pasted one step later; None for (0, 41).
        refine_time: the refine mask counts at steps c with first < c <= last; None for (0, 25).
        prox: what becomes of the guidance d where |d| <= threshold: None leaves it, "l0" sets it to 0, "l1" also
            shrinks the rest by the threshold.
        quantile: of |d| over all rows, channels and places; it gives the threshold.
        recon_t: unedited places are pulled towards the trajectory at timesteps below this.
        recon_lr: how far they are pulled, 0 to 1.
        dilate_radius: cells by which edited places (|d| > threshold) grow.
        grow_remove, grow_open, grow_layer: pixels by which masks grow at a size of 1024, in proportion at others (heed's
            choice): of what is removed, of what zoom and pan leave open, of layers and the refine mask.

    Raises:
        ValueError: a number outside its range.
    """

    steps: int = _AUTHORS_STEPS
    guidance_scale: float = 7.5
    mask_time: Window | None = None
    blend_time: Window | None = None
    refine_time: Window | None = None
    prox: Literal["l0", "l1"] | None = None
    quantile: float = 0.75
    recon_t: int = 400
    recon_lr: float = 0.1
    dilate_radius: int = 2
    grow_remove: int = 20
    grow_open: int = 30
    grow_layer: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be 1 or more")
        for name, authors in (("mask_time", (0, 40)), ("blend_time", (0, 41)), ("refine_time", (0, 25))):
            window = getattr(self, name)
            if window is None:
                window = tuple(round(k * self.steps / _AUTHORS_STEPS) for k in authors)
                object.__setattr__(self, name, window)
            first, last = window
            if not 0 <= first <= last <= self.steps:
                raise ValueError(f"{name}={window} must rise and lie inside 0..{self.steps}, the steps")
        if self.prox not in (None, "l0", "l1"):
            raise ValueError(f"prox={self.prox!r} must be None, 'l0' or 'l1'")
        for name in ("quantile", "recon_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if self.dilate_radius < 0:
            raise ValueError(f"dilate_radius={self.dilate_radius} must be 0 or more")

    @property
    def mask_steps(self) -> range:
        """Steps, from 0, at which keys are blanked: both ends of `mask_time` are left out."""
        first, last = self.mask_time or (0, 0)
        return range(first + 1, last)

    @property
    def refine_steps(self) -> range:
        """Steps, from 0, at which the refine mask counts: the first end is left out."""
        first, last = self.refine_time or (0, 0)
        return range(first + 1, last + 1)

    @property
    def blend_steps(self) -> range:
        """Steps, from 1, after which the background is blended: both ends belong to it."""
        first, last = self.blend_time or (0, 0)
        return range(first, last + 1)
