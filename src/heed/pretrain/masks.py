"""Which tokens an encoder does not see: mask generators as immutable values, and the order of tokens a mask implies.

    mask = RandomMask(0.75)(batch, (14, 14), generator=rng)          (B, N) bool, True = masked
    order = order_of(mask)                                           ids of the visible tokens, and the way back

A generator scores every token and leaves the ones with the largest scores visible, the same number in every image:

    kept = int(N * (1 - ratio));   ids = argsort(scores, descending);   keep = ids[:kept];   restore = argsort(ids)
    mask = restore >= kept

Random and grid-wise masks are those of He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022,
arXiv 2111.06377; blocks are those of Bao et al., "BEiT", ICLR 2022, arXiv 2106.08254.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from heed.catalogue import provides


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """Tokens sorted into visible and masked.

    Args:
        mask: (B, N), True = masked.
        keep: (B, K) ids of the visible tokens, in the order in which an encoder gets them.
        restore: (B, N) where each token is in the sequence [visible, masked].
    """

    mask: Bool[Tensor, "B N"]
    keep: Int64[Tensor, "B K"]
    restore: Int64[Tensor, "B N"]


def order_tokens(scores: Float[Tensor, "B N"], kept: int) -> TokenOrder:
    """The order in which the `kept` tokens with the largest scores are visible; equal scores stay in raster order."""
    shuffled = scores.argsort(dim=1, descending=True, stable=True)
    restore = shuffled.argsort(dim=1)
    return TokenOrder(restore >= kept, shuffled[:, :kept], restore)


def order_of(mask: Bool[Tensor, "B N"]) -> TokenOrder:
    """The order of a mask, visible tokens in raster order; every image must have the same number of them."""
    visible = (~mask).sum(1)
    if (visible != visible[0]).any():
        raise ValueError(f"the mask leaves {sorted(set(visible.tolist()))} tokens visible; all images need the same")
    return order_tokens((~mask).float(), int(visible[0]))


def take(tokens: Tensor, ids: Int64[Tensor, "B K"]) -> Tensor:
    """Tokens (B, N, C) at ids (B, K): (B, K, C)."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def count_visible(tokens: int, ratio: float) -> int:
    """int(tokens * (1 - ratio)), as the authors of masked autoencoders count; at least one token on either side."""
    kept = int(tokens * (1 - ratio))
    if not 0 < kept < tokens:
        raise ValueError(
            f"ratio={ratio} leaves {kept} of {tokens} tokens visible; both visible and masked tokens are needed"
        )
    return kept


def piece_size(mask: Bool[Tensor, "B N"], grid: tuple[int, int]) -> float:
    """How many tokens the pieces of what is visible have on average; tokens hang together by their sides."""
    visible = ~mask.view(-1, 1, *grid)
    names = torch.arange(1.0, visible.numel() + 1, device=mask.device).view(visible.shape) * visible
    while True:  # a piece takes the largest name in it
        wider = torch.maximum(F.max_pool2d(names, (3, 1), 1, (1, 0)), F.max_pool2d(names, (1, 3), 1, (0, 1))) * visible
        if torch.equal(wider, names):
            return float(visible.sum() / len(names[visible].unique()))
        names = wider


class MaskGenerator(ABC):
    """Base of the mask generators; a subclass is a frozen dataclass that scores tokens and says how many stay."""

    @abstractmethod
    def visible(self, grid: tuple[int, ...]) -> int:
        """How many tokens of a grid stay visible.

        Raises:
            ValueError: the grid does not fit.
        """

    @abstractmethod
    def scores(
        self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Float[Tensor, "B N"]:
        """(batch, N) scores, on the generator's device; the tokens with the largest stay visible."""

    def __call__(
        self, batch: int, grid: tuple[int, ...], *, generator: torch.Generator | None = None
    ) -> Bool[Tensor, "B N"]:
        """Masks for a batch.

        Args:
            batch: number of images B.
            grid: rows and columns of tokens, N in all.
            generator: source of randomness, and the device of the result; None for torch's own on the CPU.

        Returns:
            (B, N), True = masked; the same number in every row.

        Raises:
            ValueError: the grid does not fit, or no token would be visible or masked.
        """
        return self.order(batch, grid, generator=generator).mask

    def order(self, batch: int, grid: tuple[int, ...], *, generator: torch.Generator | None = None) -> TokenOrder:
        """As `__call__`, with the visible tokens in the order of their scores."""
        kept = self.visible(grid)
        return order_tokens(self.scores(batch, grid, generator), kept)


def check_ratio(ratio: float) -> None:
    """Raise ValueError for what is no share of tokens to mask."""
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio}: the share of masked tokens lies in [0, 1)")


def device_of(generator: torch.Generator | None) -> torch.device:
    """Where a generator's numbers come to be."""
    return torch.device("cpu") if generator is None else generator.device


def _rows_and_columns(mask: MaskGenerator, grid: tuple[int, ...]) -> tuple[int, int]:
    if len(grid) != 2:
        raise ValueError(f"grid={grid}: {type(mask).__name__} works on rows and columns")
    return grid[0], grid[1]


@provides("06-colormae")
@dataclass(frozen=True)
class RandomMask(MaskGenerator):
    """Every token alike: a share of the tokens, drawn uniformly. Works on grids of any number of axes.

    Args:
        ratio: share of masked tokens.
    """

    ratio: float = 0.75

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def visible(self, grid: tuple[int, ...]) -> int:
        return count_visible(math.prod(grid), self.ratio)

    def scores(
        self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Float[Tensor, "B N"]:
        return torch.rand(batch, math.prod(grid), generator=generator, device=device_of(generator))


@dataclass(frozen=True)
class GridMask(MaskGenerator):
    """One visible token in every cell of period x period, at the same place of every cell.

    The place is drawn for every image (heed's choice; He et al. show one place).

    Args:
        period: side of a cell; 2 masks three tokens of four.
    """

    period: int = 2

    def __post_init__(self) -> None:
        if self.period < 2:
            raise ValueError(f"period={self.period}: cells have sides of at least 2 tokens")

    def visible(self, grid: tuple[int, ...]) -> int:
        rows, columns = _rows_and_columns(self, grid)
        if rows % self.period or columns % self.period:
            raise ValueError(f"a grid of {rows} x {columns} tokens is not tiled by cells of side {self.period}")
        return rows * columns // self.period**2

    def scores(
        self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Float[Tensor, "B N"]:
        device = device_of(generator)
        place = torch.randint(self.period, (2, batch, 1), generator=generator, device=device)
        on_row, on_column = (
            torch.arange(side, device=device) % self.period == offset for side, offset in zip(grid, place, strict=True)
        )
        return (on_row[:, :, None] & on_column[:, None]).flatten(1).float()


@runtime_checkable
class Draws(Protocol):
    """Where the random numbers of a block mask come from, in the order in which they are asked for."""

    def uniform(self, low: float, high: float) -> float:
        """A number between low and high; high may be the smaller one."""
        ...

    def integer(self, high: int) -> int:
        """One of 0, ..., high."""
        ...


class _GeneratorDraws:
    """Draws from a torch.Generator, fetched many at a time."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator
        self._stock: list[float] = []

    def _next(self) -> float:
        if not self._stock:
            numbers = torch.rand(256, generator=self._generator, device=device_of(self._generator))
            self._stock = numbers.tolist()
        return self._stock.pop()

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._next()

    def integer(self, high: int) -> int:
        return min(int(self._next() * (high + 1)), high)


def draw_blocks(
    grid: tuple[int, int],
    masked: int,
    draws: Draws,
    *,
    least: int = 16,
    most: int | None = None,
    aspect: float = 0.3,
) -> Bool[Tensor, "H W"]:
    """One mask of rectangles with exactly `masked` tokens.

    A rectangle has an area ~ U(least, min(what is left to mask, most)) and a log-uniform aspect ratio; it is taken where
    it is smaller than the grid on both sides and adds between one token and as many as are left. Once fewer than `least`
    are left, areas lie between what is left and `least`.

    Args:
        grid: rows and columns.
        masked: how many tokens to mask.
        draws: random numbers, asked for in the order area, log aspect, top, left.
        least, most: area of a rectangle in tokens; most=None for no bound.
        aspect: smallest ratio of height to width, the inverse of the largest.
    """
    rows, columns = grid
    mask = torch.zeros(grid, dtype=torch.bool)
    left_to_mask, failures = masked, 0
    while left_to_mask:
        area = draws.uniform(least, min(left_to_mask, most or masked))
        ratio = math.exp(draws.uniform(math.log(aspect), -math.log(aspect)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        added = 0
        if height < rows and width < columns:
            top, left = draws.integer(rows - height), draws.integer(columns - width)
            block = mask[top : top + height, left : left + width]
            added = block.numel() - int(block.sum())
            if 0 < added <= left_to_mask:
                block[:] = True
                left_to_mask -= added
                failures = 0
                continue
        failures += 1
        if failures == _PATIENCE:  # nothing fits any more: single tokens, the first to be found from a random one on
            free = (~mask.view(-1)).nonzero()[:, 0]
            start = draws.integer(len(free) - 1)
            mask.view(-1)[free.roll(-start)[:left_to_mask]] = True
            left_to_mask = 0
    return mask


_PATIENCE = 200  # attempts without success; the published generators would try for ever


@dataclass(frozen=True)
class BlockMask(MaskGenerator):
    """Rectangles of masked tokens, as many as the ratio asks for, exactly. See `draw_blocks`.

    Args:
        ratio: share of masked tokens.
        least: smallest area of a rectangle in tokens; None for 16 on 14 x 14 tokens, and in proportion on other grids.
        most: largest area; None for no bound.
        aspect: smallest ratio of height to width, the inverse of the largest; in (0, 1].
    """

    ratio: float = 0.75
    least: int | None = None
    most: int | None = None
    aspect: float = 0.3

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if not 0 < self.aspect <= 1:
            raise ValueError(f"aspect={self.aspect}: give the smallest ratio of height to width, in (0, 1]")
        for name in ("least", "most"):
            area = getattr(self, name)
            if area is not None and area < 1:
                raise ValueError(f"{name}={area}: a rectangle has at least 1 token")

    def visible(self, grid: tuple[int, ...]) -> int:
        rows, columns = _rows_and_columns(self, grid)
        if min(rows, columns) < 2:
            raise ValueError(f"a grid of {rows} x {columns} tokens has no room for blocks; both sides need 2 tokens")
        return count_visible(rows * columns, self.ratio)

    def scores(
        self, batch: int, grid: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Float[Tensor, "B N"]:
        rows, columns = _rows_and_columns(self, grid)
        masked = rows * columns - self.visible(grid)
        least = max(1, round(rows * columns * 16 / 196)) if self.least is None else self.least
        draws = _GeneratorDraws(generator)
        blocks = [
            draw_blocks((rows, columns), masked, draws, least=least, most=self.most, aspect=self.aspect)
            for _ in range(batch)
        ]
        return (~torch.stack(blocks).flatten(1)).float().to(device_of(generator))


@provides("06-colormae")
@dataclass(frozen=True)
class MaskSchedule:
    """Another mask generator from certain epochs on, e.g. MaskSchedule(((0, green), (200, blue), (250, red))).

    Args:
        stages: pairs of the first epoch and its generator; epochs rise from 0.
    """

    stages: tuple[tuple[int, MaskGenerator], ...]

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError(f"stages begin at epochs {starts}; they must rise from 0")

    def at(self, epoch: int) -> MaskGenerator:
        """The generator of an epoch, counted from 0."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: epochs count from 0")
        return [mask for start, mask in self.stages if start <= epoch][-1]
