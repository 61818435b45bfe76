"""Coloured noise in two dimensions: filters of white noise, and a bank of patterns from which masks are cut.

With white noise W (L, M, M), G_s a Gaussian of standard deviation s pixels and * circular convolution:

    red    G_s * W                    low-pass        blue    W - G_s * W                      high-pass
    green  G_s1 * W - G_s2 * W        band-pass       purple  W - (G_s1 * W - G_s2 * W)        band-stop,  s1 < s2

Hinojosa, Liu, Ghanem, "ColorMAE: Exploring data-independent masking strategies in Masked AutoEncoders", ECCV 2024,
arXiv 2407.13036. The authors publish filtered banks but neither the script nor its deviations: the circular boundary,
the kernel's radius int(4 s + 0.5), s = 1 (red, blue) and s1, s2 = 0.5, 2 (green, purple) are heed's choice.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from heed.catalogue import provides
from heed.checkpoint import write_atomically
from heed.pretrain.masks import device_of

COLORS = ("white", "red", "blue", "green", "purple")
SIGMA = 1.0  # red, blue
SIGMAS = (0.5, 2.0)  # green, purple
PATTERNS, SIZE = 3072, 64  # of a bank
_CHUNK = 256  # patterns filtered at once


@provides("06-colormae")
def filter_noise(
    white: Float[Tensor, "*L M N"], color: str, sigma: float | tuple[float, float] | None = None
) -> Float[Tensor, "*L M N"]:
    """Noise of a colour from white noise, on a torus: opposite borders meet.

    Args:
        white: (..., M, N) patterns of any size.
        color: "white", "red", "blue", "green" or "purple".
        sigma: deviation of the Gaussian in pixels, one for red and blue (default 1), two for green and purple (default
            0.5 and 2, the smaller first); white takes none.

    Raises:
        ValueError: unknown colour, or deviations that do not suit it.
    """
    sigma = check_sigma(color, sigma)
    if sigma is None:  # white
        return white.clone()
    rows, columns = white.shape[-2:]

    def gaussian(s: float) -> Tensor:
        """G_s in the frequency domain, (M, N // 2 + 1); real, because the kernel is even."""
        vertical, horizontal = (torch.fft.fft(_on_ring(s, side, white)).real for side in (rows, columns))
        return vertical[:, None] * horizontal[: columns // 2 + 1]

    passed = gaussian(sigma[0]) - gaussian(sigma[1]) if isinstance(sigma, tuple) else gaussian(sigma)
    filtered = torch.fft.irfft2(torch.fft.rfft2(white) * passed, s=(rows, columns))
    return filtered if color in ("red", "green") else white - filtered


def _on_ring(sigma: float, side: int, like: Tensor) -> Float[Tensor, " side"]:
    """exp(-x^2 / 2 s^2) for |x| <= int(4 s + 0.5), sum 1, wrapped around a ring of `side` pixels."""
    radius = int(4 * sigma + 0.5)
    x = torch.arange(-radius, radius + 1, dtype=like.dtype, device=like.device)
    weights = torch.exp(-(x**2) / (2 * sigma**2)) if radius else torch.ones_like(x)
    ring = torch.zeros(side, dtype=like.dtype, device=like.device)
    return ring.index_add_(0, x.long() % side, weights / weights.sum())


def check_sigma(color: str, sigma: float | tuple[float, float] | None) -> float | tuple[float, float] | None:
    """The deviations of a colour, defaults filled in; ValueError where colour or deviations are wrong."""
    if color not in COLORS:
        raise ValueError(f"color={color!r}: choose one of {', '.join(COLORS)}")
    if color == "white":
        if sigma is not None:
            raise ValueError(f"sigma={sigma}: white noise is not filtered")
        return None
    if color in ("red", "blue"):
        sigma = SIGMA if sigma is None else sigma
        if isinstance(sigma, tuple) or not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"sigma={sigma}: {color} noise takes one deviation of at least 0")
        return sigma
    sigma = SIGMAS if sigma is None else sigma
    if not isinstance(sigma, tuple) or len(sigma) != 2 or not 0 <= sigma[0] < sigma[1] < math.inf:
        raise ValueError(f"sigma={sigma}: {color} noise takes two deviations, 0 <= sigma1 < sigma2")
    return sigma


@provides("06-colormae")
def periodogram(pattern: Float[Tensor, "*L M N"]) -> Float[Tensor, "*L M N"]:
    """|FFT| of a pattern less its mean, over its number of pixels, frequency 0 in the middle."""
    centred = pattern - pattern.mean((-2, -1), keepdim=True)
    magnitude = torch.fft.fft2(centred).abs() / (pattern.shape[-2] * pattern.shape[-1])
    return torch.fft.fftshift(magnitude, dim=(-2, -1))


@provides("06-colormae")
class NoiseBank:
    """Patterns of noise made once, from which windows are cut for every batch.

    `NoiseBank.make("green")` builds one, `save` and `load` keep it; `load` also reads the authors' .npz files.

    Args:
        patterns: (L, M, M), finite.
        color: what they are; None when it is not known.
        sigma: deviations they were filtered with; None for white noise, or when they are not known.
        seed: of the white noise they were made from; None when it is not known.
    """

    def __init__(
        self,
        patterns: Float[Tensor, "L M M"],
        color: str | None = None,
        sigma: float | tuple[float, float] | None = None,
        seed: int | None = None,
    ) -> None:
        if patterns.ndim != 3 or patterns.shape[1] != patterns.shape[2] or 0 in patterns.shape:
            raise ValueError(f"patterns have shape {tuple(patterns.shape)}; a bank is (L, M, M)")
        if not torch.isfinite(patterns).all():
            raise ValueError("patterns hold NaN or infinite numbers; make the bank anew with NoiseBank.make")
        if color is not None and color not in COLORS:
            raise ValueError(f"color={color!r}: choose one of {', '.join(COLORS)}")
        self.patterns = patterns
        self.color = color
        self.sigma = sigma
        self.seed = seed

    def __repr__(self) -> str:
        count, size, _ = self.patterns.shape
        return f"NoiseBank({self.color}, {count} patterns of {size} x {size}, sigma={self.sigma}, seed={self.seed})"

    @property
    def size(self) -> int:
        """Side M of the patterns in pixels."""
        return self.patterns.shape[1]

    @classmethod
    def make(
        cls,
        color: str,
        *,
        patterns: int = PATTERNS,
        size: int = SIZE,
        sigma: float | tuple[float, float] | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Filter standard-normal white noise.

        Args:
            color: see `filter_noise`, as for sigma.
            patterns: how many, L.
            size: their side M in pixels, at least the side of the token grids they are meant for.
            sigma: deviations of the filter; None for the defaults.
            seed: of the white noise.
            device: where the bank is made and kept.
        """
        sigma = check_sigma(color, sigma)
        generator = torch.Generator(device).manual_seed(seed)
        white = torch.randn(patterns, size, size, generator=generator, device=device)
        return cls(torch.cat([filter_noise(part, color, sigma) for part in white.split(_CHUNK)]), color, sigma, seed)

    def change_color(self, color: str, sigma: float | tuple[float, float] | None = None) -> None:
        """Filter the same white noise to another colour, in place; masks cut from this bank change with it.

        Raises:
            ValueError: it is not known which white noise the bank was made from; load the other colour's file instead.
        """
        if self.seed is None:
            raise ValueError(f"{self!r} does not know its white noise; load a bank of color {color!r} instead")
        count, size, _ = self.patterns.shape
        device = self.patterns.device
        other = self.make(color, patterns=count, size=size, sigma=sigma, seed=self.seed, device=device)
        self.patterns, self.color, self.sigma = other.patterns, other.color, other.sigma

    def to(self, device: str | torch.device) -> Self:
        """Move the bank, in place; returns it."""
        self.patterns = self.patterns.to(device)
        return self

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file, or an .npz file as the authors' (which holds the patterns alone)."""
        path = Path(path)
        patterns = self.patterns.detach().cpu().contiguous()
        if path.suffix == ".npz":
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, patterns.numpy())
            return
        sigma = self.sigma if isinstance(self.sigma, tuple) else (() if self.sigma is None else (self.sigma,))
        described = {"color": self.color or "", "sigma": " ".join(map(str, sigma)), "seed": str(self.seed)}
        write_atomically(path, safetensors.torch.save({"patterns": patterns}, metadata=described))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, or the authors' .npz (its first array); their colour is read from the file's name.

        Raises:
            FileNotFoundError: there is no such file; says how to make a bank.
            ValueError: the file holds no bank.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no noise bank at {path}; NoiseBank.make('green') makes one, .save(path) keeps it")
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                if not arrays.files:
                    raise ValueError(f"{path} holds no array; a bank is one of shape (L, M, M)")
                patterns = torch.from_numpy(arrays[arrays.files[0]])
            color = next((color for color in COLORS if color in path.name), None)
            return cls(patterns if patterns.is_floating_point() else patterns.float(), color)
        with safetensors.safe_open(path, "pt") as file:
            if "patterns" not in file.keys():  # noqa: SIM118 - the file is no mapping
                raise ValueError(f"{path} holds {sorted(file.keys())}, not the 'patterns' of a noise bank")
            described, patterns = file.metadata() or {}, file.get_tensor("patterns")
        numbers = tuple(map(float, described.get("sigma", "").split()))
        sigma = (numbers[0], numbers[1]) if len(numbers) == 2 else next(iter(numbers), None)
        seed = described.get("seed", "None")
        return cls(patterns, described.get("color") or None, sigma, None if seed == "None" else int(seed))

    def draw(self, count: int, side: int, generator: torch.Generator | None = None) -> Int64[Tensor, "count 4"]:
        """Random places for windows of `side` pixels: rows of (top, left, mirror left-right, mirror top-bottom).

        Raises:
            ValueError: the window is larger than the patterns.
        """
        if side > self.size:
            raise ValueError(
                f"a window of {side} x {side} does not fit the bank's patterns of {self.size} x {self.size}"
            )
        device = device_of(generator)
        places = torch.randint(self.size - side + 1, (count, 2), generator=generator, device=device)
        mirrors = torch.randint(2, (count, 2), generator=generator, device=device)
        return torch.cat([places, mirrors], 1)

    def windows(
        self,
        batch: int,
        side: int,
        draws: Int64[Tensor, "G 4"],
        *,
        which: Int64[Tensor, " B"] | None = None,
        normalise: bool = True,
    ) -> Float[Tensor, "B n n"]:
        """Windows of the patterns, one per image.

        As in the authors' code, images come in groups of L: image i of a group takes pattern i, and a whole group is cut
        and mirrored alike.

        Args:
            batch: how many.
            side: of a window in pixels.
            draws: from `draw`, one row per group, ceil(batch / L) of them; or, with `which`, one per image.
            which: number of each image's pattern.
            normalise: divide every window by its largest value, as the authors do. That turns the order of its values
                around where the largest is negative.
        """
        device = self.patterns.device
        draws = draws.to(device)
        if which is None:
            image = torch.arange(batch, device=device)
            which, draws = image % len(self.patterns), draws[image // len(self.patterns)]
        top, left, mirror, flip = draws.T[..., None]
        along = torch.arange(side, device=device)
        rows = top + torch.where(flip.bool(), side - 1 - along, along)
        columns = left + torch.where(mirror.bool(), side - 1 - along, along)
        windows = self.patterns[which.to(device)[:, None, None], rows[:, :, None], columns[:, None]]
        if not normalise:
            return windows
        largest = windows.amax((1, 2), keepdim=True)
        return windows / torch.where(largest == 0, 1, largest)
