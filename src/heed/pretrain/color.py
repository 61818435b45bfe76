"""ColorMAE's masks: the visible patches are where a window of coloured noise is largest.

    window = crop and mirror(noise of a colour), over its maximum          (B, n, n), n = image side / patch side
    keep = the int(N (1 - ratio)) largest of its N = n n values;   the rest is masked

Hinojosa, Liu, Ghanem, "ColorMAE: Exploring data-independent masking strategies in Masked AutoEncoders", ECCV 2024,
arXiv 2407.13036. The paper's text masks the largest values; the authors' code keeps them, and so does heed. Green noise,
a band of middle frequencies, gave the authors the best features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.pretrain.masks import MaskGenerator, check_ratio, count_visible, device_of
from heed.pretrain.noise import COLORS, NoiseBank


@cache
def default_bank(color: str) -> NoiseBank:
    """The bank of a colour that masks are cut from when none is given: 3072 patterns of 64 x 64, made on first use."""
    return NoiseBank.make(color)


@provides("06-colormae")
@dataclass(frozen=True)
class ColorMask(MaskGenerator):
    """Masks from coloured noise, on square grids.

    Args:
        noise: "green", "blue", "purple", "red" or "white", for a bank with heed's default filters (48 MB, made on first
            use); or a `NoiseBank` of your own.
        ratio: share of masked tokens.
        per_sample: cut every image's window from a random pattern at a place of its own (heed's option). The authors cut
            the first patterns of the bank, for a whole batch at one place.
        faithful: divide windows by their largest value, which turns the few around whose largest value is negative;
            False leaves them as they are.
    """

    noise: str | NoiseBank = "green"
    ratio: float = 0.75
    per_sample: bool = False
    faithful: bool = True

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if isinstance(self.noise, str) and self.noise not in COLORS:
            raise ValueError(f"noise={self.noise!r}: choose one of {', '.join(COLORS)}, or give a NoiseBank")

    @property
    def bank(self) -> NoiseBank:
        """The noise that masks are cut from."""
        return default_bank(self.noise) if isinstance(self.noise, str) else self.noise

    def visible(self, grid: tuple[int, ...]) -> int:
        if len(grid) != 2 or grid[0] != grid[1]:
            raise ValueError(f"a grid of {' x '.join(map(str, grid))} tokens is not square; windows of noise are")
        return count_visible(grid[0] ** 2, self.ratio)

    def windows(self, batch: int, side: int, generator: torch.Generator | None = None) -> Float[Tensor, "B n n"]:
        """Random windows of the noise, (batch, side, side), on the generator's device."""
        bank = self.bank
        groups = batch if self.per_sample else -(-batch // len(bank.patterns))
        draws, which = bank.draw(groups, side, generator), None
        if self.per_sample:
            which = torch.randint(len(bank.patterns), (batch,), generator=generator, device=device_of(generator))
        windows = bank.windows(batch, side, draws, which=which, normalise=self.faithful)
        return windows.to(device_of(generator))

    def scores(
        self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Float[Tensor, "B N"]:
        return self.windows(batch, grid[0], generator).flatten(1)
