"""Subspace attention: its equation group by group, what it may and may not change, its limits and its hosts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import SEModule
from timm.layers.cbam import CbamModule
from torch import Tensor, nn

import heed
from heed.layers.registry import create_layer
from heed.layers.ulsam import ULSAM

quick = settings(max_examples=12)
sides = st.integers(2, 7)
shapes = st.sampled_from([(8, 1), (8, 2), (8, 4), (8, 8), (6, 3)])  # channels, groups


def layer_and_input(channels: int = 8, groups: int = 4, height: int = 5, width: int = 6) -> tuple[ULSAM, Tensor]:
    torch.manual_seed(0)
    layer = ULSAM(channels, groups).eval()
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if name.endswith("running_var") else nn.init.normal_(tensor)
    return layer, torch.randn(2, channels, height, width)


def one_group(layer: ULSAM, n: int, maps: Tensor) -> tuple[Tensor, Tensor]:
    """The equation for the n-th group alone: attention and output."""
    m = layer.channels // layer.groups
    own, point = slice(n * m, (n + 1) * m), slice(n, n + 1)

    def norm(x: Tensor, bn: nn.BatchNorm2d, part: slice) -> Tensor:
        return F.relu(F.batch_norm(x, bn.running_mean[part], bn.running_var[part], bn.weight[part], bn.bias[part]))  # type: ignore[index]

    x = maps[:, own]
    u = x * layer.conv_dws.weight[own, 0] + layer.conv_dws.bias[own, None, None]  # type: ignore[index]
    u = F.max_pool2d(norm(u, layer.bn_dws, own), 3, 1, 1)
    s = (u * layer.conv_point.weight[n]).sum(1, keepdim=True) + layer.conv_point.bias[n]  # type: ignore[index]
    a = norm(s, layer.bn_point, point).flatten(2).softmax(-1).view(s.shape)
    return a, a * x + x


@quick
@given(shapes, sides, sides)
@torch.no_grad()
def test_equals_the_equation_group_by_group(shape: tuple[int, int], height: int, width: int) -> None:
    layer, x = layer_and_input(*shape, height, width)
    groups = [one_group(layer, n, x) for n in range(layer.groups)]
    torch.testing.assert_close(layer.attention(x), torch.cat([a for a, _ in groups], 1))
    torch.testing.assert_close(layer(x), torch.cat([y for _, y in groups], 1))


@quick
@given(shapes, sides, sides)
@torch.no_grad()
def test_gains_lie_between_one_and_two(shape: tuple[int, int], height: int, width: int) -> None:
    layer, x = layer_and_input(*shape, height, width)
    torch.testing.assert_close(layer.attention(x).sum((2, 3)), torch.ones(2, layer.groups))
    gain = (layer(x) / x).unflatten(1, (layer.groups, -1))
    torch.testing.assert_close(gain, gain[:, :, :1].expand_as(gain), rtol=1e-3, atol=1e-4)
    assert ((gain > 0.999) & (gain < 2.001)).all()
    torch.testing.assert_close(
        gain.mean((3, 4)), torch.full(gain.shape[:3], 1 + 1 / (height * width)), rtol=1e-3, atol=0
    )


@torch.no_grad()
def test_permuted_groups_give_permuted_outputs() -> None:
    layer, x = layer_and_input()
    order = torch.tensor([2, 0, 3, 1])
    channels = (2 * order[:, None] + torch.arange(2)).flatten()
    other = ULSAM(8, 4).eval()
    state = {
        key: value[order if value.shape[:1] == (4,) else channels] if value.ndim else value
        for key, value in layer.state_dict().items()
    }
    other.load_state_dict(state)
    torch.testing.assert_close(other(x[:, channels]), layer(x)[:, channels])


@torch.no_grad()
def test_maps_of_groups_differ_and_a_constant_map_is_uniform() -> None:
    layer, x = layer_and_input()
    layer.train()  # scores of mean 0, so that the ReLU leaves some of every group
    for a in range(4):
        for b in range(a):
            assert (layer.attention(x)[:, a] - layer.attention(x)[:, b]).abs().max() > 1e-3
    layer.eval()
    flat = torch.randn(2, 8, 1, 1).expand(2, 8, 5, 6)
    torch.testing.assert_close(layer(flat), flat * (1 + 1 / 30))


def test_gradients_are_finite_where_nothing_stands_out() -> None:
    layer, x = layer_and_input()
    nn.init.constant_(layer.bn_point.bias, -100.0)
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, x * (1 + 1 / 30))
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("channels", "groups", "count"), [(512, 4, 2572), (96, 4, 492), (16, 1, 83)])
def test_parameters(channels: int, groups: int, count: int) -> None:
    assert sum(p.numel() for p in ULSAM(channels, groups).parameters()) == count == 5 * channels + 3 * groups
    assert ULSAM(channels, groups).flops(7, 7) == 2 * channels * 49


def test_momentum_and_eps() -> None:
    layer = ULSAM(4, 2)
    assert (layer.bn_dws.momentum, layer.bn_point.momentum, layer.bn_dws.eps) == (0.9, 0.9, 1e-5)
    assert ULSAM(4, 2, momentum=0.1).bn_point.momentum == 0.1


def test_half_precision_keeps_the_attention() -> None:
    layer, x = layer_and_input(height=40, width=40)
    expected = layer.attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        maps = layer.attention(x)
        assert layer(x).dtype == torch.float32
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 4), rtol=1e-4, atol=0)
    torch.testing.assert_close(maps, expected, rtol=0.2, atol=1e-3)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_are_those_of_the_function() -> None:
    layer, x = layer_and_input(height=3, width=3)
    assert torch.autograd.gradcheck(layer.double(), x.double().requires_grad_())


def test_exports() -> None:
    layer, x = layer_and_input()
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_stacks_with_other_attention() -> None:
    x = torch.randn(2, 16, 6, 6)
    stack = nn.Sequential(ULSAM(16, 4), SEModule(16), ULSAM(16, 2), CbamModule(16))
    y = stack(x)
    assert y.shape == x.shape
    y.square().mean().backward()
    assert all(p.grad is not None for p in stack.parameters())


def test_drops_into_the_vit_host() -> None:
    layer: Any = create_layer("ulsam", 16, 4, (5, 6)).eval()
    assert layer.groups == 4
    x = torch.randn(2, 5, 6, 16)
    layer.channels_last = False
    expected = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    layer.channels_last = True
    torch.testing.assert_close(layer(x), expected)
    assert heed.create_model("vit_micro", attention="ulsam")(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_a_single_position_is_doubled_with_a_warning() -> None:
    layer, x = layer_and_input(height=1, width=1)
    with pytest.warns(UserWarning, match="1 x 1"):
        torch.testing.assert_close(layer(x), 2 * x)


@pytest.mark.parametrize(("channels", "groups"), [(10, 4), (4, 8), (8, 0)])
def test_groups_must_divide_channels(channels: int, groups: int) -> None:
    with pytest.raises(ValueError, match=f"channels={channels} is not divisible by groups={groups}"):
        ULSAM(channels, groups)


@pytest.mark.parametrize(
    ("shape", "message"), [((2, 8, 5), "four axes"), ((8, 5, 5), "four axes"), ((2, 5, 5, 8), "channels=8.*has 5")]
)
def test_bad_input(shape: tuple[int, ...], message: str) -> None:
    layer, _ = layer_and_input()
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape))


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match="'conv.weight' is no name"):
        ULSAM(8, 4).load_authors({"conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="does not fit ULSAM; missing"):
        ULSAM(8, 4).load_authors({"subspaces.0.conv_dws.weight": torch.zeros(2, 1, 1, 1)})
