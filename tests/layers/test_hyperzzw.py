"""The HyperZ.Z.W operator: its forms, slow nets, units and standardisation, and its place in a grid host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import heed
from heed.layers.hyperzzw import (
    RGU,
    GlobalHyperZZW,
    GroupStandardisation,
    HyperChannelInteraction,
    HyperInteraction,
    HyperZZWMixer,
    LocalHyperZZW,
    hyperzzw_global,
    hyperzzw_local,
    hyperzzw_twofold,
    si_glu,
)
from heed.layers.registry import create_layer
from heed.layers.slow_net import ContextSlowNet, SlowNet

quick = settings(max_examples=6, deadline=None)
ROUNDING: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@quick
@given(st.integers(2, 9), st.integers(1, 4))
def test_a_kernel_of_ones_leaves_the_product_of_the_maps(size: int, dim: int) -> None:
    x, fast = torch.randn(2, 2, dim, size, size)
    torch.testing.assert_close(hyperzzw_global(x * torch.ones(1, dim, size, size), fast), x @ fast)


@quick
@given(st.integers(2, 12))
def test_sequences_are_convolved_around_a_circle(length: int) -> None:
    context, z = torch.randn(2, 1, 3, length)
    places = (torch.arange(length)[:, None] - torch.arange(length)) % length
    expected = torch.einsum("bcnm,bcm->bcn", context[..., places], z)
    torch.testing.assert_close(hyperzzw_global(context, z), expected, **ROUNDING)


@quick
@given(st.sampled_from([1, 3, 5]), st.integers(1, 2))
def test_the_local_form_is_a_depthwise_convolution(size: int, axes: int) -> None:
    z, kernel = torch.randn(2, 3, *(6,) * axes), torch.zeros(3, 1, *(size,) * axes)
    kernel[(slice(None), 0, *(size // 2,) * axes)] = 2.0
    torch.testing.assert_close(hyperzzw_local(kernel, z), 2 * z)


@quick
@given(st.integers(1, 9))
def test_the_twofold_form_is_even(size: int) -> None:
    kernel, z = torch.randn(1, 1, size, size), torch.randn(3, 1, size, size)
    assert torch.equal(hyperzzw_twofold(kernel, -z), hyperzzw_twofold(kernel, z))
    torch.testing.assert_close(hyperzzw_twofold(kernel, z), kernel * z.square())


def test_gate() -> None:
    x = torch.randn(10)
    torch.testing.assert_close(si_glu(x), x.sigmoid() * x)


@pytest.mark.parametrize("axes", [1, 2])
def test_slow_net_is_the_product_of_its_filters(axes: int) -> None:
    net = SlowNet(5, 3, 4, 2, axes=axes, omega=0.3)
    nn.init.normal_(net.bias)
    c = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 5)] * axes, indexing="ij"), -1)

    def linear(part: Any, x: Tensor) -> Tensor:
        return F.linear(x, part.weight.flatten(1), part.bias)

    o = linear(net.filters[0], c).sin()
    for sine, mix in zip(net.filters[1:], net.linears, strict=True):
        o = linear(sine, c).sin() * linear(mix, o) + net.bias.view(*(5,) * axes, 1)
    torch.testing.assert_close(net()[0].movedim(0, -1), linear(net.output, o), **ROUNDING)


def test_initial_frequencies_follow_omega_and_fall_with_the_layer() -> None:
    net = SlowNet(4, 1, 4000, 1, omega=2000.0)
    first, second = (sine.weight.abs().mean().item() for sine in net.filters)  # type: ignore[union-attr,operator]
    expected = 2 * torch.pi * 2000 * 0.5 * 0.5**0.5  # times the mean of Gamma(6 / (l + 1), 1)
    assert first == pytest.approx(6 * expected, rel=0.05)
    assert second == pytest.approx(3 * expected, rel=0.05)
    assert not net.bias.any()
    assert not net.filters[0].bias.any()  # type: ignore[union-attr,operator]
    assert (net.linears[0].bias == 1).all()  # type: ignore[union-attr]


def test_a_large_kernel_starts_with_small_weights() -> None:
    def spread(size: int) -> float:
        torch.manual_seed(0)
        return SlowNet(size, 8, 64, omega=1.0).output.weight.std().item()

    assert spread(4) / spread(16) == pytest.approx(4, rel=1e-4)


def test_phases_stay_in_single_precision_under_autocast() -> None:
    net = SlowNet(8, 2, 4, omega=50.0)
    with torch.autocast("cpu", torch.bfloat16):
        low = net()
    torch.testing.assert_close(low.float(), net(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("learnable", [False, True])
def test_local_kernels_renormalise_and_learn_through_beta_alone(learnable: bool) -> None:
    net = ContextSlowNet(3, 4, 5, learnable=learnable, omega=1.0)
    o = torch.randn(1, 5, 3, 3, requires_grad=True)
    y = net.renormalise(o)
    unit = o / o.square().sum((2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(y, o + 0.1 * unit)
    got, expected = (torch.autograd.grad(z.pow(3).sum(), o, retain_graph=True)[0] for z in (y, o.detach() + 0.1 * unit))
    torch.testing.assert_close(got, expected)
    assert torch.equal(net.renormalise(torch.zeros(1, 5, 3, 3)), torch.zeros(1, 5, 3, 3))
    assert ("alpha" in net.state_dict()) == learnable


def test_local_kernels_depend_on_the_mean_of_the_batch() -> None:
    net = ContextSlowNet(3, 4, 5, omega=1.0)
    x = torch.randn(6, 4, 8, 8)
    kernel = net(x)
    assert kernel.shape == (4, 1, 3, 3)
    torch.testing.assert_close(net(x.mean(0, keepdim=True)), kernel)
    torch.testing.assert_close(net(x.flip(0)), kernel)
    assert not torch.allclose(net(x[:1]), kernel)


@quick
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2))
def test_groups_are_standardised_over_the_batch_or_the_sample(share: int, batch: int, axes: int) -> None:
    x = 3 + 2 * torch.randn(batch, 12 * share, *(6,) * axes)
    y = GroupStandardisation(12 * share)(x)
    assert y.mean().abs() < 1e-6
    for i, group in enumerate(y.unflatten(1, (12, share)).unbind(1)):
        flat = group.flatten(2)
        over = (2,) if i % 2 else (0, 2)
        torch.testing.assert_close(flat.mean(over), torch.zeros_like(flat.mean(over)), rtol=0, atol=1e-5)
        torch.testing.assert_close(flat.var(over, correction=0), torch.ones_like(flat.mean(over)), rtol=0, atol=1e-3)


@torch.no_grad()
def test_recursive_gated_unit() -> None:
    unit = RGU(3, 5)
    u = torch.randn(2, 3, 5, 5)
    nn.init.zeros_(unit.k.weight)
    nn.init.ones_(unit.bias)  # the gate is shut: GELU(0) + p is all that L_y reads
    torch.testing.assert_close(unit(u), unit.y(torch.ones_like(u)))


@quick
@given(st.floats(-1, 1))
@torch.no_grad()
def test_scores_lie_between_0_and_1(level: float) -> None:
    x = torch.rand(2, 4, 6, 6).double() + 0.5  # in single precision a sigmoid is 1 from 17 on
    channel, hyper = HyperChannelInteraction(4, 4, omega=0.3).double(), HyperInteraction(4, 6, 4, 4, omega=0.3).double()
    for y in (channel(x), hyper(x, x + level)):
        assert ((y > 0) & (y < x)).all()


@pytest.mark.parametrize("axes", [1, 2])
def test_every_output_sees_every_input(axes: int) -> None:
    layer = GlobalHyperZZW(2, 6, 8, axes=axes, omega=0.3)
    x = torch.randn(1, 2, *(6,) * axes, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[(0, 0, *(2,) * axes)], x)
    assert grad.abs().flatten(1).min() > 0


def test_samples_of_the_global_form_are_independent() -> None:
    layer = HyperZZWMixer(4, 6, 8, omega=0.3)
    x = torch.randn(3, 6, 6, 4)
    torch.testing.assert_close(layer(x), torch.cat([layer(part) for part in x.split(1)]), **ROUNDING)


@pytest.mark.parametrize("axes", [1, 2])
def test_local_branch_of_one_sample(axes: int) -> None:
    x = torch.randn(1, 4, *(6,) * axes)
    assert LocalHyperZZW(4, 3, axes=axes, omega=1.0)(x, x).shape == x.shape


def test_drops_into_the_vit_host_and_learns_there() -> None:
    model = heed.create_model("vit_micro", attention="hyperzzw", depth=2)
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
    ("build", "message"),
    [
        (lambda: SlowNet(0, 1, 4), "size=0 of a slow net must be at least 1"),
        (lambda: SlowNet(4, 1, 4, 0), "layers=0"),
        (lambda: ContextSlowNet(4, 3, 4), "size=4: a local kernel needs an odd size, such as 5"),
        (lambda: GroupStandardisation(20), "dim=20 must be a multiple of groups=12"),
        (lambda: GroupStandardisation(9, 3), "groups=3, and these an even number"),
        (lambda: GlobalHyperZZW(4, 1), "size=1: maps of one position"),
        (lambda: create_layer("hyperzzw", 8, 2, (4, 6)), r"grid=\(4, 6\)"),
    ],
)
def test_bad_settings(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (2, 4, 5, 6), (2, 4, 6, 6), (4, 5, 5)])
def test_maps_of_another_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"input \(.* made for maps \(B, 4, 5, 5\)"):
        GlobalHyperZZW(4, 5)(torch.zeros(shape))


def test_bad_operands() -> None:
    with pytest.raises(ValueError, match=r"must both be \(B, C, S, S\)"):
        hyperzzw_global(torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 4, 5))
    with pytest.raises(ValueError, match="with odd k"):
        hyperzzw_local(torch.zeros(2, 1, 4, 4), torch.zeros(1, 2, 4, 5))
    with pytest.raises(ValueError, match="grid of tokens"):
        HyperZZWMixer(4, 5)(torch.zeros(1, 25, 4))
