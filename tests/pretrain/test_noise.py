"""Coloured noise: the identities of its filters, and the bank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter

from heed.pretrain.noise import COLORS, NoiseBank, filter_noise, periodogram

SIDES = st.tuples(st.integers(1, 20), st.integers(1, 20))


@given(SIDES, st.floats(0, 3), st.floats(0, 2), st.floats(0.1, 2))
@settings(max_examples=25)
def test_filters_split_white_noise(sides, sigma, sigma1, more) -> None:
    white = torch.randn(2, *sides, generator=torch.Generator().manual_seed(0))
    red, blue = (filter_noise(white, color, sigma) for color in ("red", "blue"))
    green, purple = (filter_noise(white, color, (sigma1, sigma1 + more)) for color in ("green", "purple"))
    torch.testing.assert_close(red + blue, white, rtol=0, atol=1e-6)
    torch.testing.assert_close(green + purple, white, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.3])
def test_red_noise_is_what_scipy_says(sigma: float) -> None:
    white = torch.randn(13, 9, dtype=torch.float64)
    wanted = gaussian_filter(white.numpy(), sigma, mode="wrap", truncate=4.0)
    np.testing.assert_allclose(filter_noise(white, "red", sigma), wanted, atol=1e-12)


def test_no_blur_leaves_everything_to_red() -> None:
    white = torch.randn(3, 8, 8)
    torch.testing.assert_close(filter_noise(white, "red", 0.0), white)
    torch.testing.assert_close(filter_noise(white, "blue", 0.0), torch.zeros_like(white), rtol=0, atol=1e-6)
    assert torch.equal(filter_noise(white, "white"), white)


def test_colors_are_bands_of_frequency() -> None:
    bands = {}
    for color in COLORS:
        power = periodogram(NoiseBank.make(color, patterns=64, size=32).patterns).square().mean(0)
        rows, columns = torch.meshgrid(torch.arange(-16, 16), torch.arange(-16, 16), indexing="ij")
        frequency = (rows**2 + columns**2).sqrt() / 32
        low, middle, high = (
            power[(frequency > a) & (frequency <= b)].mean() for a, b in ((0, 0.06), (0.12, 0.24), (0.4, 0.5))
        )
        bands[color] = (low, middle, high)
    assert bands["red"][0] > bands["red"][1] > bands["red"][2]
    assert bands["blue"][0] < bands["blue"][1] < bands["blue"][2]
    assert bands["green"][1] > max(bands["green"][0], bands["green"][2])
    assert bands["purple"][1] < min(bands["purple"][0], bands["purple"][2])


def test_a_window_whose_largest_value_is_negative_is_turned_around_by_the_authors_rule() -> None:
    bank = NoiseBank(torch.tensor([[[-1.0, -2.0], [-4.0, -3.0]]]))
    draws = torch.zeros(1, 4, dtype=torch.long)
    assert bank.windows(1, 2, draws).flatten().tolist() == [1, 2, 4, 3]
    assert bank.windows(1, 2, draws, normalise=False).flatten().tolist() == [-1, -2, -4, -3]
    assert torch.equal(NoiseBank(torch.zeros(1, 2, 2)).windows(1, 2, draws), torch.zeros(1, 2, 2))


def test_a_bank_is_made_again_from_its_seed_and_changes_color_in_place() -> None:
    bank = NoiseBank.make("green", patterns=300, size=8, seed=3)
    again = NoiseBank.make("green", patterns=300, size=8, seed=3)
    assert torch.equal(bank.patterns, again.patterns)
    bank.change_color("purple")
    assert (bank.color, bank.sigma) == ("purple", (0.5, 2.0))
    white = NoiseBank.make("white", patterns=300, size=8, seed=3).patterns
    torch.testing.assert_close(bank.patterns + again.patterns, white)
    assert bank.to("cpu") is bank


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("color", ["red", "green", "white"])
def test_a_bank_is_saved_and_loaded(color: str, suffix: str, tmp_path) -> None:
    bank = NoiseBank.make(color, patterns=3, size=8)
    path = tmp_path / f"{color}_noise_data_3{suffix}"
    bank.save(path)
    loaded = NoiseBank.load(path)
    assert torch.equal(loaded.patterns, bank.patterns)
    assert loaded.color == color
    if suffix == ".safetensors":
        assert (loaded.sigma, loaded.seed) == (bank.sigma, bank.seed)
    else:
        with pytest.raises(ValueError, match="does not know its white noise"):
            loaded.change_color("blue")


def test_files_that_hold_no_bank(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"NoiseBank.make\('green'\)"):
        NoiseBank.load(tmp_path / "green.npz")
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(ValueError, match="holds no array"):
        NoiseBank.load(tmp_path / "empty.npz")
    save_file({"noise": torch.zeros(1, 2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not the 'patterns'"):
        NoiseBank.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseBank(torch.zeros(4, 4)), r"\(4, 4\); a bank is \(L, M, M\)"),
        (lambda: NoiseBank(torch.zeros(1, 4, 5)), r"\(1, 4, 5\)"),
        (lambda: NoiseBank(torch.full((1, 2, 2), torch.nan)), "NaN"),
        (lambda: NoiseBank(torch.zeros(1, 2, 2), "teal"), "'teal': choose one of white, red"),
        (lambda: filter_noise(torch.zeros(4, 4), "teal"), "'teal': choose one of white, red"),
        (lambda: filter_noise(torch.zeros(4, 4), "green", (2.0, 0.5)), "0 <= sigma1 < sigma2"),
        (lambda: filter_noise(torch.zeros(4, 4), "purple", (1.0, 1.0)), "0 <= sigma1 < sigma2"),
        (lambda: filter_noise(torch.zeros(4, 4), "green", 1.0), "takes two"),
        (lambda: filter_noise(torch.zeros(4, 4), "red", -1.0), "sigma=-1.0"),
        (lambda: filter_noise(torch.zeros(4, 4), "red", (0.5, 1.0)), "takes one"),
        (lambda: filter_noise(torch.zeros(4, 4), "white", 1.0), "not filtered"),
        (lambda: NoiseBank(torch.zeros(1, 4, 4)).draw(1, 5), "5 x 5 does not fit .* 4 x 4"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
