"""Every mask generator: shape, the exact number masked, repeatability, the way back, grids that do not fit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heed.pretrain.color import ColorMask, default_bank
from heed.pretrain.masks import (
    BlockMask,
    GridMask,
    MaskGenerator,
    MaskSchedule,
    RandomMask,
    count_visible,
    draw_blocks,
    order_of,
    order_tokens,
    piece_size,
    take,
)
from heed.pretrain.noise import NoiseBank

BANK = NoiseBank.make("green", patterns=6, size=16)
# A new generator adds a line: the value, a grid that fits, and a grid that does not with what is said about it.
MASKS: dict[str, tuple[MaskGenerator, tuple[int, ...], tuple[int, ...], str]] = {
    "random": (RandomMask(0.75), (3, 5), (1, 1), "0 of 1 tokens visible"),
    "random, video": (RandomMask(0.9), (2, 4, 4), (1,), "0 of 1 tokens visible"),
    "block": (BlockMask(0.6), (5, 7), (1, 9), "1 x 9 tokens has no room"),
    "block, small": (BlockMask(0.9, least=1, most=4), (4, 4), (2, 3, 4), "rows and columns"),
    "grid": (GridMask(2), (4, 6), (4, 5), "4 x 5 tokens is not tiled"),
    "grid, 3": (GridMask(3), (6, 3), (6,), "rows and columns"),
    "color": (ColorMask(BANK, 0.75), (7, 7), (4, 6), "4 x 6 tokens is not square"),
    "color, per sample": (
        ColorMask(BANK, 0.5, per_sample=True, faithful=False),
        (6, 6),
        (17, 17),
        "17 x 17 .* 16 x 16",
    ),
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=MASKS)
def case(request: pytest.FixtureRequest) -> tuple[MaskGenerator, tuple[int, ...], tuple[int, ...], str]:
    return MASKS[request.param]


def test_shape_and_exact_number(case) -> None:
    mask, grid, _, _ = case
    drawn = mask(8, grid, generator=rng())
    assert drawn.shape == (8, math.prod(grid))
    assert drawn.dtype == torch.bool
    assert ((~drawn).sum(1) == mask.visible(grid)).all()
    assert mask(1, grid).shape == (1, math.prod(grid))


def test_the_generator_alone_decides(case) -> None:
    mask, grid, _, _ = case
    assert torch.equal(mask(8, grid, generator=rng()), mask(8, grid, generator=rng()))
    assert not torch.equal(mask(8, grid, generator=rng()), mask(8, grid, generator=rng(1)))
    before = torch.get_rng_state()
    mask(8, grid, generator=rng())
    assert torch.equal(torch.get_rng_state(), before)


def test_visible_then_masked_comes_back_in_raster_order(case) -> None:
    mask, grid, _, _ = case
    tokens = torch.randn(8, math.prod(grid), 3)
    for order in (order_of(mask(8, grid, generator=rng())), mask.order(8, grid, generator=rng())):
        hidden = torch.stack([t[m] for t, m in zip(tokens, order.mask, strict=True)])
        visible = take(tokens, order.keep)
        there = torch.zeros_like(order.mask).scatter(1, order.keep, True)
        assert torch.equal(there, ~order.mask)
        back = take(torch.cat([visible, torch.zeros_like(hidden)], 1), order.restore)
        assert torch.equal(back, tokens.masked_fill(order.mask[..., None], 0))


def test_it_is_a_value(case) -> None:
    mask, _, _, _ = case
    assert hash(mask) == hash(mask)
    assert type(mask).__name__ in repr(mask)
    with pytest.raises(AttributeError):
        mask.ratio = 0.1  # type: ignore[attr-defined]


def test_grids_that_do_not_fit(case) -> None:
    mask, _, wrong, message = case
    with pytest.raises(ValueError, match=message):
        mask(2, wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_masks_come_to_be_on_the_generators_device(case) -> None:
    mask, grid, _, _ = case
    assert mask(2, grid, generator=torch.Generator("cuda").manual_seed(0)).is_cuda


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomMask(1.0), r"ratio=1.0.*\[0, 1\)"),
        (lambda: BlockMask(-0.1), "ratio=-0.1"),
        (lambda: ColorMask(BANK, 2), "ratio=2"),
        (lambda: RandomMask(0.0)(1, (4, 4)), "16 of 16 tokens visible"),
        (lambda: ColorMask(BANK, 0.99)(1, (4, 4)), "0 of 16 tokens visible"),
        (lambda: GridMask(1), "period=1"),
        (lambda: BlockMask(aspect=0.0), "aspect=0.0"),
        (lambda: BlockMask(least=0), "least=0"),
        (lambda: ColorMask("teal"), "'teal'.*white, red, blue, green, purple"),
        (lambda: MaskSchedule(((5, RandomMask()),)), r"epochs \[5\]"),
        (lambda: MaskSchedule(()), "must rise from 0"),
        (lambda: MaskSchedule(((0, RandomMask()),)).at(-1), "epoch=-1"),
        (lambda: order_of(torch.tensor([[True, False], [False, False]])), r"\[1, 2\] tokens visible"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(st.integers(2, 400), st.floats(0, 0.999))
@settings(max_examples=50)
def test_the_count_truncates_as_the_authors(tokens: int, ratio: float) -> None:
    kept = int(tokens * (1 - ratio))
    if 0 < kept < tokens:
        assert count_visible(tokens, ratio) == kept
    else:
        with pytest.raises(ValueError, match="visible and masked tokens"):
            count_visible(tokens, ratio)


@given(st.integers(2, 9), st.integers(2, 9), st.data())
@settings(max_examples=30)
def test_blocks_mask_any_number_exactly(rows: int, columns: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, rows * columns - 1))
    mask = BlockMask(1 - (rows * columns - count + 0.5) / (rows * columns))
    assert (mask(2, (rows, columns), generator=rng()).sum(1) == count).all()


def test_blocks_are_rectangles() -> None:
    class Replayed:
        def __init__(self) -> None:
            self.numbers = iter([6.0, 0.0, 1, 2])  # area, log aspect, top, left

        def uniform(self, low: float, high: float) -> float:
            return next(self.numbers)

        def integer(self, high: int) -> int:
            return int(next(self.numbers))

    mask = draw_blocks((5, 6), 4, Replayed(), least=4)
    assert mask.nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    together = BlockMask(0.5)(64, (14, 14), generator=rng()).view(64, 14, 14)
    alone = RandomMask(0.5)(64, (14, 14), generator=rng()).view(64, 14, 14)
    neighbours = [(m[:, 1:] == m[:, :-1]).float().mean() for m in (together, alone)]
    assert neighbours[0] > 0.8
    assert neighbours[1] < 0.55


def test_grid_masks_keep_one_place_of_every_cell() -> None:
    mask = GridMask(2)(32, (4, 4), generator=rng()).view(32, 2, 2, 2, 2)
    assert torch.equal(mask[:, :1, :, :1].expand_as(mask), mask)
    assert ((~mask)[:, 0, :, 0].flatten(1).sum(1) == 1).all()
    assert mask[:, 0, :, 0].flatten(1).unique(dim=0).shape[0] == 4


def test_equal_scores_stay_in_raster_order() -> None:
    order = order_tokens(torch.tensor([[0.0, 1, 0, 1, 1]]), 3)
    assert order.keep.tolist() == [[1, 3, 4]]


def test_color_masks_keep_the_largest_values() -> None:
    mask = ColorMask(BANK, 0.75)
    windows = mask.windows(8, 6, rng()).flatten(1)
    drawn = mask(8, (6, 6), generator=rng())
    lowest_seen = windows.masked_fill(drawn, math.inf).amin(1)
    assert (windows.masked_fill(~drawn, -math.inf).amax(1) <= lowest_seen).all()


@given(st.floats(1e-3, 1e3))
@settings(max_examples=10)
def test_a_positive_factor_on_the_noise_changes_nothing(factor: float) -> None:
    scaled = NoiseBank(BANK.patterns * factor)
    for faithful in (True, False):
        one, other = (ColorMask(bank, faithful=faithful)(7, (6, 6), generator=rng()) for bank in (BANK, scaled))
        assert torch.equal(one, other)


def test_images_of_a_batch_share_the_place_unless_per_sample() -> None:
    ramp = torch.arange(256.0).view(1, 16, 16).expand(6, -1, -1).contiguous()  # all patterns alike: the place shows
    shared = ColorMask(NoiseBank(ramp))(6, (6, 6), generator=rng())
    assert (shared == shared[0]).all()
    window = ColorMask(NoiseBank(ramp), per_sample=True, faithful=False).windows(6, 6, rng())
    assert len({float(w.min()) for w in window}) > 1


def test_white_noise_shows_every_place_alike() -> None:
    draws, ratio = 10_000, 0.75
    bank = NoiseBank.make("white", patterns=draws, size=4)
    seen = (~ColorMask(bank, ratio)(draws, (4, 4), generator=rng())).float().mean(0)
    sigma = math.sqrt(ratio * (1 - ratio) / draws)
    assert ((seen - (1 - ratio)).abs() < 4 * sigma).all()


def test_a_schedule_changes_the_color() -> None:
    green, blue = ColorMask(BANK), ColorMask(BANK, 0.5)
    schedule = MaskSchedule(((0, green), (200, blue)))
    assert schedule.at(0) is schedule.at(199) is green
    assert schedule.at(200) is schedule.at(10_000) is blue


def test_a_color_by_name_is_cut_from_the_default_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    default_bank.cache_clear()
    small = NoiseBank.make
    monkeypatch.setattr(NoiseBank, "make", lambda color: small(color, patterns=4, size=8))
    mask = ColorMask("blue")
    assert mask.bank is mask.bank
    assert mask.bank.color == "blue"
    default_bank.cache_clear()


def test_colors_leave_pieces_of_their_own_size() -> None:
    """The card's four priors: what stays visible hangs together most under red noise, least under blue."""
    size = {}
    for color in ("red", "green", "white", "blue"):
        mask = ColorMask(NoiseBank.make(color, patterns=128, size=32))
        size[color] = piece_size(mask(128, (14, 14), generator=rng()), (14, 14))
    assert size["red"] > 2 * size["green"]
    assert size["green"] > 1.1 * size["white"] > 1.2 * size["blue"]


def test_pieces_hang_together_by_their_sides() -> None:
    visible = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 1, 1]], dtype=torch.bool)
    assert piece_size(~visible.view(1, 9), (3, 3)) == pytest.approx(5 / 3)
    ring = torch.ones(7, 7, dtype=torch.bool)
    ring[1:6, 1:6] = False
    ring[3, 3] = True
    assert piece_size(~ring.view(1, 49), (7, 7)) == pytest.approx(25 / 2)
