"""Gated positional self-attention: its first weights, its limits, non-locality, and how it drops into hosts."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.convit import GPSA as TimmGPSA
from torch import Tensor, nn

import heed
from heed.layers.gpsa import GPSA, MHSA, nonlocality, relative_offsets
from heed.layers.registry import create_layer

EXACT: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
quick = settings(max_examples=15, deadline=None)
sides = st.integers(1, 6)


def layer_and_input(height: int, width: int, **options: Any) -> tuple[GPSA, Tensor]:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"qkv_bias": True} | options
    layer = GPSA(16, 4, **settings)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)  # so that a part that were forgotten would show
    return layer, torch.randn(2, height, width, 16)


@quick
@given(sides, sides, st.sampled_from(["gated", "position", "content"]))
def test_equals_the_weights_written_out(height: int, width: int, mode: str) -> None:
    layer, x = layer_and_input(height, width, mode=mode)
    tokens = x.flatten(1, 2)
    q, k = layer.qk(tokens).unflatten(-1, (2, 4, 4)).permute(2, 0, 3, 1, 4)
    content = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    position = layer.pos_proj(relative_offsets(height, width)).permute(0, 3, 1, 2).softmax(-1)
    g = layer.gates[:, None, None]
    weights = (1 - g) * content + g * position
    torch.testing.assert_close(layer.attention(x), weights, **EXACT)
    torch.testing.assert_close(layer.position_attention(height, width), position[0], **EXACT)
    v = layer.v(tokens).unflatten(-1, (4, 4)).transpose(1, 2)
    expected = layer.proj((weights @ v).transpose(1, 2).flatten(2)).view(x.shape)
    torch.testing.assert_close(layer(x), expected, **EXACT)


@quick
@given(st.integers(2, 6), st.booleans())
def test_equals_timms(side: int, bias: bool) -> None:
    theirs = TimmGPSA(16, 4, qkv_bias=bias)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    layer = GPSA(16, 4, qkv_bias=bias)
    layer.load_state_dict(theirs.state_dict())
    x = torch.randn(2, side * side, 16)
    torch.testing.assert_close(layer(x), theirs(x), **EXACT)
    torch.testing.assert_close(layer.nonlocality(x), cast(Any, theirs).get_attention_map(x), **EXACT)


@quick
@given(st.sampled_from([1, 4, 9, 16]), st.sampled_from([0.5, 1.0, 3.0]))
def test_heads_start_at_the_offsets_of_a_kernel(heads: int, strength: float) -> None:
    side, kernel = 7, math.isqrt(heads)
    layer = GPSA(2 * heads, heads, locality_strength=strength)
    position = layer.position_attention(side, side).view(heads, side, side, side, side)[:, 3, 3]
    y, x = torch.meshgrid(torch.arange(side) - 3, torch.arange(side) - 3, indexing="ij")
    for head in range(heads):
        down, right = head % kernel - (kernel - 1) / 2, head // kernel - (kernel - 1) / 2
        bump = torch.exp(-strength * ((y - down) ** 2 + (x - right) ** 2))
        torch.testing.assert_close(position[head], bump / bump.sum(), **EXACT)
        if kernel % 2:
            peak = divmod(int(position[head].argmax()), side)
            assert peak == (3 + down, 3 + right)
    assert torch.equal(layer.v.weight, torch.eye(2 * heads))
    assert torch.equal(layer.gating_param, torch.ones(heads))


def test_locality_strength_sharpens_and_zero_is_uniform() -> None:
    peaks = [
        GPSA(9, 9, locality_strength=strength).position_attention(9, 9)[4, 40, 40].item() for strength in (0, 0.5, 1, 2)
    ]
    assert peaks == sorted(peaks)
    uniform = GPSA(8, 4, locality_strength=0).position_attention(5, 4)
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / 20))


def test_heads_beyond_the_kernel_look_almost_everywhere() -> None:
    layer = GPSA(12, 6)
    peaks = layer.position_attention(5, 5)[:, 12].amax(1)
    assert (peaks[:4] > 0.15).all()
    assert (peaks[4:] < 0.1).all()


def test_an_open_gate_ignores_content_and_a_closed_one_is_self_attention() -> None:
    layer, x = layer_and_input(4, 4)
    open_, closed = (layer_and_input(4, 4)[0] for _ in range(2))
    nn.init.constant_(open_.gating_param, 50)
    nn.init.constant_(closed.gating_param, -50)
    torch.testing.assert_close(open_(x), layer_and_input(4, 4, mode="position")[0](x), **EXACT)
    before = open_(x)
    nn.init.normal_(open_.qk.weight)
    torch.testing.assert_close(open_(x), before, **EXACT)
    dense = MHSA(16, 4, qkv_bias=True)
    with torch.no_grad():
        dense.qkv.weight.copy_(torch.cat([layer.qk.weight, layer.v.weight]))
        dense.qkv.bias.copy_(torch.cat([layer.qk.bias, layer.v.bias]))
    dense.proj.load_state_dict(layer.proj.state_dict())
    tokens = x.flatten(1, 2)
    torch.testing.assert_close(closed(tokens), dense(tokens), **EXACT)
    torch.testing.assert_close(layer_and_input(4, 4, mode="content")[0](tokens), dense(tokens), **EXACT)
    torch.testing.assert_close(closed.attention(tokens), dense.attention(tokens), **EXACT)
    again = GPSA.from_attention(dense, mode="content", local_init=False)
    torch.testing.assert_close(again(tokens), dense(tokens), **EXACT)


@quick
@given(st.integers(-2, 2), st.integers(-2, 2))
def test_positions_alone_move_with_the_image(down: int, right: int) -> None:
    layer = GPSA(9, 9, mode="position", locality_strength=4.0)
    x = torch.randn(1, 12, 12, 9)
    moved = layer(x.roll((down, right), (1, 2))).roll((-down, -right), (1, 2))
    inner = slice(5, -5)
    torch.testing.assert_close(moved[:, inner, inner], layer(x)[:, inner, inner], rtol=1e-3, atol=1e-4)


@quick
@given(sides, sides)
def test_rows_sum_to_one(height: int, width: int) -> None:
    layer, x = layer_and_input(height, width)
    sums = layer.attention(x).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@quick
@given(sides, sides)
def test_nonlocality_of_uniform_attention_is_the_mean_distance(height: int, width: int) -> None:
    tokens = height * width
    found = nonlocality(torch.full((2, 3, tokens, tokens), 1 / tokens), height, width)
    places = [(y, x) for y in range(height) for x in range(width)]
    mean = sum(math.dist(a, b) for a in places for b in places) / tokens**2
    torch.testing.assert_close(found, torch.full((3,), mean))


def test_nonlocality_leaves_out_the_class_token() -> None:
    layer = MHSA(8, 2)
    x = torch.randn(2, 10, 8)
    weights = layer.attention(x)[..., 1:, 1:]
    expected = nonlocality(weights / weights.sum(-1, keepdim=True), 3, 3)
    torch.testing.assert_close(layer.nonlocality(x, 3, 3), expected)
    with pytest.raises(ValueError, match="10 tokens are fewer"):
        layer.nonlocality(x, 4, 4)


def test_dropout_is_on_the_mixed_weights() -> None:
    layer, x = layer_and_input(4, 4, attn_drop=0.5)
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    torch.manual_seed(1)
    one = layer(x)
    torch.manual_seed(1)
    weights = F.dropout(layer.attention(x), 0.5)
    v = layer.v(x.flatten(1, 2)).unflatten(-1, (4, 4)).transpose(1, 2)
    torch.testing.assert_close(one, layer.proj((weights @ v).transpose(1, 2).flatten(2)).view(x.shape), **EXACT)


def test_frozen_parts_are_not_trained() -> None:
    layer, x = layer_and_input(3, 3, freeze_gates=True, freeze_positions=True)
    layer(x).square().sum().backward()
    without = {name for name, parameter in layer.named_parameters() if parameter.grad is None}
    assert without == {"gating_param", "pos_proj.weight", "pos_proj.bias"}


def test_gradients_are_those_of_the_function() -> None:
    layer, x = layer_and_input(2, 3)
    # The positional softmax is in float32, so only what it does not touch can be checked to the last digit.
    torch.nn.init.constant_(layer.gating_param, -60)
    assert torch.autograd.gradcheck(layer.double(), x[:1].double().requires_grad_())


def test_random_start() -> None:
    layer = GPSA(8, 4, local_init=False)
    assert not torch.equal(layer.v.weight, torch.eye(8))
    assert layer.pos_proj.weight.abs().max() < 0.2


def test_half_precision() -> None:
    layer, x = layer_and_input(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    torch.testing.assert_close(mixed.float(), layer(x), rtol=0.1, atol=0.1)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), mixed.float(), rtol=0.1, atol=0.1)


def test_exports() -> None:
    layer, x = layer_and_input(4, 5)
    torch.testing.assert_close(torch.export.export(layer.eval(), (x,)).module()(x), layer(x), **EXACT)


def test_drops_into_the_vit_host_and_learns_there() -> None:
    model = heed.create_model("vit_micro", attention="gpsa", attention_options={"locality_strength": 0.5})
    y = torch.arange(16) % 4
    x = torch.randn(4, 1, 8, 8)[y] + 0.1 * torch.randn(16, 1, 8, 8)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert create_layer("gpsa", 8, 2, (3, 5))(torch.randn(1, 3, 5, 8)).shape == (1, 3, 5, 8)


def test_negative_locality_warns() -> None:
    with pytest.warns(UserWarning, match="locality_strength=-1.0 is negative"):
        GPSA(8, 4, locality_strength=-1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "dim=16 is not divisible by num_heads=3"),
        ({"mode": "gate"}, "unknown mode 'gate'; did you mean 'gated'"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPSA(16, options.pop("num_heads", 4), **options)


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((2, 17, 16), (), "17 tokens are no square grid .keep a class token outside"),
        ((2, 12, 16), (), "12 tokens are no square grid: give height and width"),
        ((2, 12, 16), (3, 5), "height=3, width=5"),
        ((2, 4, 4, 8), (), "dim=16, the input .* has 8 channels"),
        ((16, 16), (), "give"),
    ],
)
def test_bad_input(shape: tuple[int, ...], grid: tuple[int, ...], message: str) -> None:
    layer, _ = layer_and_input(4, 4)
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape), *grid)


def test_nonlocality_checks_the_grid() -> None:
    with pytest.raises(ValueError, match="not those of 2 x 3 tokens"):
        nonlocality(torch.zeros(1, 1, 5, 5), 2, 3)
