"""Patterns are values, and each is its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heed.engine.patterns import (
    Blocks,
    Causal,
    Dilated,
    Full,
    Grouped,
    Halo,
    Neighborhood,
    Selected,
    Strided,
    Subsampled,
    Window,
)

small = st.integers(1, 24)


def pairs(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(n)[:, None], torch.arange(m)[None, :]


@given(small, small, st.integers(0, 6), st.integers(0, 6), st.integers(1, 5), st.integers(-4, 4))
def test_sequence_patterns_are_their_definitions(n: int, m: int, a: int, b: int, step: int, offset: int) -> None:
    i, j = pairs(n, m)
    assert torch.equal(Full().mask(n, m), torch.ones(n, m, dtype=torch.bool))
    assert torch.equal(Causal(offset).mask(n, m), j <= i + offset)
    assert torch.equal(Window(a, b).mask(n, m), (i - a <= j) & (j <= i + b))
    assert torch.equal(Strided(step).mask(n, m), (i - j) % step == 0)
    assert torch.equal(Dilated(a, step).mask(n, m), ((i - j) % step == 0) & ((i - j).abs() <= a * step))
    shift = b % (a + 1)
    block = [x.sub(shift).div(a + 1, rounding_mode="floor") for x in (i, j)]
    assert torch.equal(Blocks(a + 1, shift).mask(n, m), block[0] == block[1])


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3))
def test_halo_is_the_block_and_its_surroundings(block: int, blocks: int, halo: int, rows: int, stride: int) -> None:
    block *= stride
    grid = (block * rows, block * blocks)
    mask = Halo(grid, block, halo, stride).mask(grid[0] * grid[1] // stride**2, grid[0] * grid[1])
    mask = mask.view(grid[0] // stride, grid[1] // stride, *grid)
    r, c, y, x = torch.meshgrid(*(torch.arange(s) for s in mask.shape), indexing="ij")
    top, left = r * stride // block * block, c * stride // block * block
    inside = (y >= top - halo) & (y < top + block + halo) & (x >= left - halo) & (x < left + block + halo)
    assert torch.equal(mask, inside)


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 2), st.data())
def test_neighborhood_holds_exactly_its_kernel(kernel: int, dilation: int, extra: int, data: st.DataObject) -> None:
    size = kernel * dilation + extra
    stride = data.draw(st.integers(1, kernel))
    mask = Neighborhood((size, size), kernel, dilation, stride).mask(size * size)
    assert (mask.sum(1) == kernel**2).all()
    causal = Neighborhood(size, kernel, dilation, stride, True).mask(size)
    assert not causal.triu(1).any()
    assert causal.diagonal().all()


def test_groups_selection_and_subsets() -> None:
    labels, keys = torch.tensor([0, 1, 0, 2]), torch.tensor([2, 0, 1])
    assert torch.equal(Grouped(labels, keys).mask(4, 3), labels[:, None] == keys)
    index = torch.tensor([[[[0, 2, 2], [-1, -1, 1]]]])
    mask = Selected(index, (2, 3)).mask(3, 8)
    assert mask.shape == (1, 1, 3, 8)
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 0, 0, 0, 1, 1]] * 2 + [[0, 0, 0, 1, 1, 1, 0, 0]]
    rule = Selected(index, (2, 3)).rule(3, 8, index.device)
    zero = torch.zeros((), dtype=torch.long)
    assert torch.equal(rule(zero, zero, torch.arange(3)[:, None], torch.arange(8)), mask[0, 0])
    drawn = Subsampled(0.25, torch.Generator().manual_seed(1))
    assert drawn == Subsampled(0.25, torch.Generator().manual_seed(1))
    mask = drawn.mask(5, 16)
    assert (mask.sum(1) == 4).all()
    assert (mask == mask[0]).all()


@given(small, small)
def test_algebra(n: int, m: int) -> None:
    a, b = Causal(), Window(3)
    assert torch.equal((a & b).mask(n, m), a.mask(n, m) & b.mask(n, m))
    assert torch.equal((a | b).mask(n, m), a.mask(n, m) | b.mask(n, m))
    assert torch.equal((~a).mask(n, m), ~a.mask(n, m))
    assert ~~a == a


def test_patterns_are_values() -> None:
    pattern = Causal() & (Window(256) | Strided(64))
    assert pattern == Causal() & (Window(256) | Strided(64))
    assert hash(pattern) == hash(Causal() & (Window(256) | Strided(64)))
    assert str(pattern) == "Causal(offset=0) & (Window(left=256, right=256) | Strided(step=64))"
    assert Grouped(torch.tensor([1, 2])) == Grouped(torch.tensor([1, 2]))
    assert len({Grouped(torch.tensor([1, 2])), Grouped(torch.tensor([1, 2])), Grouped(torch.tensor([2, 2]))}) == 2
    with pytest.raises(AttributeError):
        pattern.left = Causal()  # type: ignore[misc]


@pytest.mark.parametrize(
    "pattern",
    [
        Window(3),
        Neighborhood((6, 7), 3, (2, 1)),
        Causal() & Window(2),
        Window(2) | Strided(5),
        Blocks(4, 1),
        ~Window(2),
    ],
    ids=str,
)
def test_density_counts_pairs(pattern: object) -> None:
    assert pattern.density(42) == pytest.approx(pattern.mask(42).float().mean().item())  # type: ignore[attr-defined]


def test_plot_draws_the_mask() -> None:
    ax = (Causal() & Window(2)).plot(8)
    assert ax.get_images()[0].get_array().sum() == (Causal() & Window(2)).mask(8).sum()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Window(-1), "left=-1"),
        (lambda: Neighborhood((8, 8), 9), "kernel 9 x dilation 1 = 9 exceeds the 8 tokens of axis 0"),
        (lambda: Neighborhood((8, 8), (3, 5), (1, 2)), "axis 1"),
        (lambda: Neighborhood((8, 8), 1), "at least 2"),
        (lambda: Neighborhood((8, 8), 3, stride=4), "stride 4 on axis 0 exceeds its kernel 3"),
        (lambda: Neighborhood((8, 8), (3, 3, 3)), "3 entries for 2 axes"),
        (lambda: Neighborhood((8,) * 4, 3), "1 to 3"),
        (lambda: Neighborhood((8, 8), 3.5), "must be an integer"),
        (lambda: Blocks(0), "must be an integer >= 1"),
        (lambda: Blocks(4, 4), "shift 4"),
        (lambda: Halo((9, 8), 4, 1), "pad it by 3"),
        (lambda: Halo((8, 8), 4, 1, stride=3), "does not divide"),
        (lambda: Halo((8, 8), 4, -1), "halo"),
        (lambda: Grouped(torch.rand(4)), "integer tensor"),
        (lambda: Selected(torch.zeros(3, 4)), "integer tensor"),
        (lambda: Subsampled(1.5), "keep=1.5"),
        (lambda: Strided(0), ">= 1"),
    ],
)
def test_bad_settings_name_the_value(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (Neighborhood((8, 8), 3), "holds 64 tokens, but there are 63 queries"),
        (Halo((8, 8), 4, 1), "holds 64 tokens"),
        (Grouped(torch.zeros(5).long()), "5 queries"),
        (Selected(torch.full((1, 1, 1, 2), 3), (64, 64)), "numbered 0 to 0"),
        (Selected(torch.zeros(1, 1, 3, 2).long(), (64, 64)), "names 3 query blocks"),
        (Subsampled(64), "exceeds the 63 keys"),
        (Causal() & Blocks(2, grid=(4, 4)), "holds 16 tokens"),
    ],
    ids=str,
)
def test_patterns_that_do_not_fit_say_so(pattern: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pattern.mask(63)  # type: ignore[attr-defined]


def test_patterns_combine_with_patterns_only() -> None:
    with pytest.raises(TypeError, match="combines with a pattern"):
        Causal() & 3  # type: ignore[operator]
