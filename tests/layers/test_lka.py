"""Large kernel attention: what its gate sees, its special cases, its costs, and how it drops into a host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import heed
from heed.layers.lka import COMBINATIONS, LKA, LargeKernelAttention, VANAttention, lka_costs
from heed.layers.registry import create_layer

EXACT: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
quick = settings(max_examples=15, deadline=None)
pairs = st.sampled_from([(21, 3), (35, 5), (5, 1), (14, 2), (1, 1), (3, 3)])


def positive(layer: LKA) -> LKA:
    """All weights positive, so that nothing a gate sees can cancel."""
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.1, 1.0)
    return layer


def seen_by_the_middle(layer: LKA, side: int) -> Tensor:
    x = torch.rand(1, layer.dim, side, side, requires_grad=True)
    layer.gate(x)[:, :, side // 2, side // 2].sum().backward()
    assert x.grad is not None
    return x.grad.abs().sum((0, 1)) > 0


@quick
@given(pairs)
def test_support_is_a_full_square(pair: tuple[int, int]) -> None:
    layer = positive(LKA(2, *pair))
    seen = seen_by_the_middle(layer, 51)
    margin = (51 - layer.support) // 2
    expected = F.pad(torch.ones(layer.support, layer.support, dtype=torch.bool), (margin,) * 4)
    assert torch.equal(seen, expected)


def test_the_papers_21_is_23() -> None:
    assert LKA(1).support == 23
    assert LKA(1, omit=("conv_spatial",)).support == 5
    assert LKA(1, omit=("conv0",)).support == 19


@quick
@given(st.integers(-4, 4), st.integers(-4, 4))
def test_gate_moves_with_the_image_away_from_the_border(down: int, right: int) -> None:
    layer = LKA(3)
    x = torch.randn(1, 3, 36, 36)
    moved = layer.gate(x.roll((down, right), (2, 3))).roll((-down, -right), (2, 3))
    inner = slice(15, -15)  # 11 pixels of reach and 4 of shift
    torch.testing.assert_close(moved[..., inner, inner], layer.gate(x)[..., inner, inner], **EXACT)


@quick
@given(pairs)
def test_equals_one_large_convolution_inside_the_map(pair: tuple[int, int]) -> None:
    """Three linear convolutions make one, whose kernel is the gate's response to a pixel, turned around."""
    layer = LKA(2, *pair).double()
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    reach = layer.support // 2
    pixels = torch.eye(2, dtype=torch.float64)[:, :, None, None]
    response = layer.gate(F.pad(pixels, (2 * reach,) * 4))[..., reach : -reach or None, reach : -reach or None]
    kernel = response.flip(2, 3).transpose(0, 1)
    x = torch.randn(1, 2, 2 * reach + 3, 2 * reach + 5, dtype=torch.float64)
    inner = layer.gate(x)[..., reach : reach + 3, reach : reach + 5]
    torch.testing.assert_close(inner, F.conv2d(x, kernel))


@quick
@given(st.integers(1, 30), st.integers(1, 30), pairs)
def test_any_size_and_the_gate_of_ones_is_the_identity(height: int, width: int, pair: tuple[int, int]) -> None:
    layer = LKA(4, *pair)
    nn.init.zeros_(layer.conv1.weight)  # type: ignore[arg-type]
    nn.init.ones_(layer.conv1.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 4, height, width)
    assert torch.equal(layer(x), x)


@torch.no_grad()
def test_maps_of_every_third_pixel_make_the_dilated_convolution() -> None:
    conv = LKA(4).conv_spatial
    assert isinstance(conv, nn.Conv2d)
    for height, width in ((12, 9), (10, 7), (2, 3)):
        x = torch.randn(2, 4, height, width)
        wanted = F.conv2d(x, conv.weight, conv.bias, padding=9, dilation=3, groups=4)
        torch.testing.assert_close(conv(x), wanted)


def test_kernels_of_one_gate_each_pixel_by_itself() -> None:
    layer = LKA(3, 1, 1)
    x = torch.randn(2, 3, 4, 5)
    alone = layer(x.permute(0, 2, 3, 1).reshape(-1, 3, 1, 1)).view(2, 4, 5, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), alone)


def test_combinations() -> None:
    x = torch.randn(2, 3, 6, 6)
    for combine in COMBINATIONS:
        layer = LKA(3, combine=combine)
        gate = layer.gate(x)
        expected = {"multiply": x * gate, "add": x + gate, "none": gate, "sigmoid": x * gate.sigmoid()}
        torch.testing.assert_close(layer(x), expected[combine])


@pytest.mark.parametrize("name", ["conv0", "conv_spatial", "conv1"])
def test_convolutions_can_be_left_out(name: str) -> None:
    layer = LKA(3, omit=(name,))
    assert not any(key.startswith(f"{name}.") for key in layer.state_dict())
    x = torch.randn(2, 3, 6, 6)
    rest = [getattr(layer, other) for other in ("conv0", "conv_spatial", "conv1") if other != name]
    torch.testing.assert_close(layer(x), x * rest[1](rest[0](x)))


def test_grid_and_map_agree() -> None:
    grid, maps = LargeKernelAttention(6), VANAttention(6)
    maps.load_state_dict(grid.state_dict())
    x = torch.randn(2, 5, 7, 6)
    torch.testing.assert_close(grid(x), maps(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_shortcut_is_inside() -> None:
    module = VANAttention(4)
    nn.init.zeros_(module.proj_2.weight)
    nn.init.zeros_(module.proj_2.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(module(x), x)


@quick
@given(st.integers(1, 64), pairs, st.integers(1, 20), st.integers(1, 20))
def test_costs(dim: int, pair: tuple[int, int], height: int, width: int) -> None:
    layer = LKA(dim, *pair)
    costs = lka_costs(dim, height, width, *pair)
    assert costs["lka"].parameters == sum(p.numel() for p in layer.parameters())
    weights = sum(p.numel() for p in layer.parameters() if p.ndim > 1)
    assert costs["lka"].multiply_adds == height * width * weights
    dense = nn.Conv2d(dim, dim, pair[0])
    assert costs["dense convolution"].parameters == sum(p.numel() for p in dense.parameters())
    assert costs["depthwise convolution"].parameters == dim * (pair[0] ** 2 + 1)


def test_costs_of_the_card() -> None:
    costs = lka_costs(64, 56, 56)
    assert costs["lka"].parameters == 64 * (49 + 25 + 3 + 64) == 9_024
    assert costs["dense convolution"].parameters == 64 * 64 * 441 + 64
    assert costs["dense convolution"].parameters / costs["lka"].parameters > 190
    double = lka_costs(64, 112, 112)
    assert double["lka"].multiply_adds == 4 * costs["lka"].multiply_adds
    assert double["self-attention"].multiply_adds > 10 * costs["self-attention"].multiply_adds


def test_gradients_are_those_of_the_function() -> None:
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(VANAttention(2, 5, 1).double(), x)


def test_exports() -> None:
    layer, x = LargeKernelAttention(4).eval(), torch.randn(1, 6, 5, 4)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x), **EXACT)


def test_factory_fits_the_grid() -> None:
    def support(grid: tuple[int, int], **options: int) -> int:
        layer = create_layer("lka", 8, 2, grid, **options)
        assert isinstance(layer, LargeKernelAttention)
        return layer.spatial_gating_unit.support

    assert support((8, 8)) == 15
    assert support((14, 14)) == 23
    assert support((8, 8), kernel_size=9, dilation=3) == 11


def test_drops_into_the_vit_host_and_learns_there() -> None:
    model = heed.create_model("vit_micro", attention="lka", attention_options={"combine": "sigmoid"})
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 7, "dilation": 2}, r"kernel_size=7 with dilation=2 gives an even .*=6 or 10 .*\(21, 3\)"),
        ({"kernel_size": 0}, "kernel_size=0 must be an integer >= 1"),
        ({"dilation": 1.5}, "dilation=1.5 must be an integer >= 1"),
        ({"combine": "multipy"}, "unknown combine 'multipy'; did you mean 'multiply'"),
        ({"omit": ("conv2",)}, "unknown convolution to omit 'conv2'"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LKA(4, **options)


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (4, 8, 8), (2, 8, 8, 4)])
@pytest.mark.parametrize("kind", [LKA, VANAttention])
def test_bad_input(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"input \("):
        kind(4)(torch.zeros(shape))
