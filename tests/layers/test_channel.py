"""Channel attention: its equations by hand, its symmetries, both scales, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import heed
from heed.layers.channel import ChannelGroupAttention

EXACT = {"rtol": 1e-4, "atol": 1e-5}
VARIANTS = [{}, {"v2": True}, {"v2": True, "dynamic_scale": False}]
variants = pytest.mark.parametrize("options", VARIANTS, ids=["original", "v2", "v2 without dynamic scale"])


def layer_and_input(tokens: int = 12, **options: Any) -> tuple[ChannelGroupAttention, Tensor]:
    torch.manual_seed(0)
    layer = ChannelGroupAttention(12, 3, **options)
    torch.nn.init.normal_(layer.qkv.weight, std=0.5)
    return layer, torch.randn(2, tokens, 12)


@settings(max_examples=12)
@given(st.integers(1, 9), st.sampled_from(VARIANTS), st.booleans())
def test_the_equations(tokens: int, options: dict[str, bool], bias: bool) -> None:
    layer, x = layer_and_input(tokens, qkv_bias=bias, **options)
    q, k, v = layer.qkv(x).view(2, tokens, 3, 3, 4).permute(2, 0, 3, 1, 4)  # (B, g, N, c)
    if layer.v2:
        logits = q.transpose(2, 3) @ k / (tokens if layer.dynamic_scale else 4) ** 0.5
        y = v @ logits.softmax(-1).transpose(2, 3)
    else:
        logits = k.transpose(2, 3) @ v / 2
        y = q @ logits.softmax(-1).transpose(2, 3)
    expected = layer.proj(y.transpose(1, 2).reshape(2, tokens, 12))
    torch.testing.assert_close(layer(x), expected, **EXACT)
    torch.testing.assert_close(layer.weights(x), logits.softmax(-1), **EXACT)


@variants
def test_rows_of_the_weights_sum_to_one_over_channels(options: dict[str, bool]) -> None:
    layer, x = layer_and_input(**options)
    weights = layer.weights(x)
    assert weights.shape == (2, 3, 4, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4))


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from(VARIANTS))
def test_positions_have_no_order(seed: int, options: dict[str, bool]) -> None:
    layer, x = layer_and_input(**options)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], **EXACT)


@variants
def test_groups_are_blocks_on_the_diagonal(options: dict[str, bool]) -> None:
    """What happens in one group's channels of q, k, v leaves the others' outputs alone."""
    layer, x = layer_and_input(**options)
    layer.proj = torch.nn.Identity()  # type: ignore[assignment]
    y = layer(x)
    with torch.no_grad():
        for start in (0, 12, 24):
            layer.qkv.weight[start + 4 : start + 8] += 1  # the second group
    moved = (layer(x) != y).any(0).any(0)
    assert moved.tolist() == [False] * 4 + [True] * 4 + [False] * 4


@pytest.mark.parametrize(("options", "factor"), [({}, 2.0), ({"v2": True}, 2**0.5)])
def test_duplicated_tokens_multiply_the_logits(options: dict[str, bool], factor: float) -> None:
    layer, x = layer_and_input(**options)

    def logits(tokens: Tensor) -> Tensor:  # up to the constant of a row, which softmax takes out
        log = layer.weights(tokens).log()
        return log - log.mean(-1, keepdim=True)

    torch.testing.assert_close(logits(x.repeat(1, 2, 1)), factor * logits(x), rtol=1e-3, atol=1e-4)


def test_every_position_reaches_every_other() -> None:
    layer, x = layer_and_input()
    x.requires_grad_()
    layer(x)[0, 0].sum().backward()
    assert x.grad is not None
    assert (x.grad[0].abs().amax(-1) > 0).all()


@variants
def test_any_layout_of_positions(options: dict[str, bool]) -> None:
    layer, x = layer_and_input(**options)
    torch.testing.assert_close(layer(x.view(2, 3, 4, 12)), layer(x).view(2, 3, 4, 12))


@variants
def test_gradients_are_those_of_the_function(options: dict[str, bool]) -> None:
    layer, x = layer_and_input(5, **options)
    assert torch.autograd.gradcheck(layer.double(), x[:1].double().requires_grad_())


def test_half_precision_survives_logits_beyond_its_range() -> None:
    """Sums over 4,096 positions pass float16's 65,504; in float32 nothing overflows."""
    layer, _ = layer_and_input()
    x = 8 + torch.randn(1, 4096, 12)
    q, k, _, scale = layer._channels(x)
    assert (q @ k.transpose(2, 3) * scale).abs().max() > 65_504
    exact = layer.double()(x.double())
    low = layer.half()(x.half())
    assert torch.isfinite(low).all()
    torch.testing.assert_close(low.double(), exact, rtol=0.05, atol=0.5)


def test_empty_input() -> None:
    layer, _ = layer_and_input()
    assert layer(torch.empty(0, 4, 4, 12)).shape == (0, 4, 4, 12)


def test_multiply_adds() -> None:
    assert ChannelGroupAttention(96, 3).multiply_adds(56, 56) == 56 * 56 * (4 * 96**2 + 2 * 32 * 96)


def test_bad_settings_and_input() -> None:
    with pytest.raises(ValueError, match="dim=12 is not divisible by num_heads=5"):
        ChannelGroupAttention(12, 5)
    for shape in ((2, 12, 3, 4), (2, 12), (2, 4, 4, 11)):
        with pytest.raises(ValueError, match=r"takes tokens \(B, ..., 12\), channels last"):
            ChannelGroupAttention(12, 3)(torch.zeros(shape))


@variants
def test_drops_into_the_vit_host(options: dict[str, bool]) -> None:
    model = heed.create_model("vit_micro", attention="channel", attention_options=options)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
