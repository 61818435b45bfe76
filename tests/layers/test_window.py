"""Window attention: the pattern it follows, padding, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import heed
from heed.engine.attend import attend
from heed.engine.patterns import Blocks, Full
from heed.layers.attention import PatternAttention
from heed.layers.registry import create_layer
from heed.layers.window import WindowAttention

EXACT = {"rtol": 1e-4, "atol": 1e-5}


def layer_and_input(height: int, width: int, window: int, **options: Any) -> tuple[WindowAttention, Tensor]:
    torch.manual_seed(0)
    layer = WindowAttention(8, 2, window, **options)
    torch.nn.init.normal_(layer.qkv.weight)
    return layer, torch.randn(2, height, width, 8)


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_follows_the_pattern_of_blocks_on_the_padded_grid(height: int, width: int, window: int, bias: bool) -> None:
    layer, x = layer_and_input(height, width, window, qkv_bias=bias)
    padded = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    grid = tuple(padded.shape[1:3])
    q, k, v = layer.qkv(padded).view(2, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    y = attend(q, k, v, Blocks((window, window), grid=grid), backend="reference").transpose(1, 2)  # type: ignore[union-attr]
    expected = layer.proj(y.reshape(padded.shape))[:, :height, :width]
    torch.testing.assert_close(layer(x), expected, **EXACT)


def test_padding_is_a_key_that_equals_the_bias() -> None:
    """One token in a window of four: the three others weigh in with key and value b."""
    layer, x = layer_and_input(1, 1, 2)
    torch.nn.init.normal_(layer.qkv.bias)
    q, k, v = layer.qkv(x).view(2, 3, 2, 1, 4).unbind(1)
    _, bk, bv = (part.expand(2, 2, 3, 4) for part in layer.qkv.bias.view(3, 1, 2, 1, 4))
    y = attend(q, torch.cat([k, bk], 2), torch.cat([v, bv], 2), Full())
    torch.testing.assert_close(layer(x), layer.proj(y.reshape(2, 1, 1, 8)), **EXACT)  # type: ignore[union-attr]


def test_one_window_is_full_attention() -> None:
    layer, x = layer_and_input(5, 5, 5)
    full = PatternAttention(8, 2)
    full.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), full(x), **EXACT)


@settings(max_examples=8)
@given(st.integers(0, 5), st.integers(0, 6))
def test_a_token_reaches_its_window_alone(row: int, column: int) -> None:
    layer, x = layer_and_input(6, 7, 3)
    other = x.clone()
    other[:, row, column] += 1
    moved = (layer(other) != layer(x)).any(-1).any(0)
    window = torch.zeros(6, 7, dtype=torch.bool)
    window[row // 3 * 3 : row // 3 * 3 + 3, column // 3 * 3 : column // 3 * 3 + 3] = True
    assert torch.equal(moved, window)


def test_gradients_are_those_of_the_function() -> None:
    layer, x = layer_and_input(3, 4, 2)
    assert torch.autograd.gradcheck(layer.double(), x[:1].double().requires_grad_())


def test_half_precision_and_empty_batches() -> None:
    layer, x = layer_and_input(5, 4, 2)
    half = layer(x).bfloat16()
    torch.testing.assert_close(layer.bfloat16()(x.bfloat16()), half, rtol=0.1, atol=0.1)
    assert layer(torch.empty(0, 4, 4, 8).bfloat16()).shape == (0, 4, 4, 8)


def test_multiply_adds() -> None:
    assert WindowAttention(96, 3).multiply_adds(56, 56) == 56 * 56 * (4 * 96**2 + 2 * 49 * 96)
    assert WindowAttention(96, 3).multiply_adds(50, 51) == WindowAttention(96, 3).multiply_adds(56, 56)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, "window_size=0 must be an integer >= 1"),
        ({"window_size": 2.0}, "window_size=2.0 must be an integer"),
        ({"num_heads": 3}, "dim=8 is not divisible by num_heads=3"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowAttention(8, **{"num_heads": 2} | options)


@pytest.mark.parametrize("shape", [(2, 8, 4, 5), (2, 20, 8), (4, 5, 8), (2, 4, 5, 9)])
def test_bad_input(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes a grid of tokens \(B, H, W, 8\), channels last"):
        WindowAttention(8, 2)(torch.zeros(shape))


@pytest.mark.parametrize(("grid", "window"), [((56, 56), 7), ((8, 8), 4), ((14, 14), 7), ((5, 5), 2), ((1, 9), 4)])
def test_factory_fits_the_grid(grid: tuple[int, int], window: int) -> None:
    layer = create_layer("window", 8, 2, grid)
    assert layer.window_size == window
    assert layer(torch.randn(1, *grid, 8)).shape == (1, *grid, 8)


def test_drops_into_the_vit_host() -> None:
    model = heed.create_model("vit_micro", attention="window", attention_options={"window_size": 3})
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
