"""HiLo attention: what its branches may see, its limits, its counts, and how it drops into hosts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import heed
from heed.layers.hilo import HiLoAttention, radial_spectrum
from heed.layers.registry import create_layer

EXACT = {"rtol": 1e-4, "atol": 2e-5}
quick = settings(max_examples=20, deadline=None)
sides = st.integers(1, 7)


def layer_and_input(height: int, width: int, **options: Any) -> tuple[HiLoAttention, Tensor]:
    torch.manual_seed(0)
    layer = HiLoAttention(16, 4, **{"qkv_bias": True} | options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)  # so that a bias that were forgotten would show
    return layer, torch.randn(2, height, width, 16)


@quick
@given(sides, sides, st.integers(1, 4), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.booleans())
def test_equals_multi_head_attention_written_out(height: int, width: int, s: int, alpha: float, bias: bool) -> None:
    layer, x = layer_and_input(height, width, window_size=s, alpha=alpha, qkv_bias=bias)
    padded = F.pad(x, (0, 0, 0, -width % s, 0, -height % s))
    rows, columns = padded.shape[1] // s, padded.shape[2] // s
    windows = padded.view(2, rows, s, columns, s, 16)
    expected = []
    if layer.high_heads:
        tokens = windows.transpose(2, 3).reshape(2 * rows * columns, s * s, 16)
        y = layer.h_proj(heads_attend(*layer.h_qkv(tokens).chunk(3, -1)))
        expected.append(y.view(2, rows, columns, s, s, -1).transpose(2, 3).reshape(*padded.shape[:3], -1))
    if layer.low_heads:
        k, v = layer.l_kv(windows.mean((2, 4)).flatten(1, 2)).chunk(2, -1)
        y = layer.l_proj(heads_attend(layer.l_q(padded.flatten(1, 2)), k, v))
        expected.append(y.view(*padded.shape[:3], -1))
    torch.testing.assert_close(layer(x), torch.cat(expected, -1)[:, :height, :width], **EXACT)


def heads_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of heads of width 4 on (B, N, C)."""
    q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_window_of_one_is_softmax_attention() -> None:
    layer, x = layer_and_input(3, 5, window_size=1)
    dense = create_layer("softmax", 16, 4, (3, 5))
    with torch.no_grad():
        dense.qkv.weight.copy_(torch.cat([layer.l_q.weight, layer.l_kv.weight]))
        dense.qkv.bias.copy_(torch.cat([layer.l_q.bias, layer.l_kv.bias]))
    dense.proj.load_state_dict(layer.l_proj.state_dict())
    torch.testing.assert_close(layer(x), dense(x), **EXACT)


@quick
@given(st.integers(0, 2), st.integers(0, 1))
def test_hifi_sees_its_window_only(row: int, column: int) -> None:
    layer, x = layer_and_input(6, 4, alpha=0.0)
    changed = x.clone()
    changed[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
    moved = (layer(changed) - layer(x)).abs().amax((0, 3)) > 1e-6
    inside = torch.zeros(6, 4, dtype=torch.bool)
    inside[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = True
    assert torch.equal(moved, inside)


def test_lofi_sees_window_means_only() -> None:
    layer, x = layer_and_input(6, 4)
    noise = torch.randn(2, 2, 2, 16)
    changed = x.clone()
    changed[:, 2:4, 0:2] += noise - noise.mean((1, 2), keepdim=True)
    moved = (layer.branches(changed)[1] - layer.branches(x)[1]).abs().amax((0, 3)) > 1e-5
    assert moved[2:4, 0:2].all()  # their own queries
    assert moved.sum() == 4
    changed[:, 2:4, 0:2] += 1  # another mean: everyone sees it
    assert ((layer.branches(changed)[1] - layer.branches(x)[1]).abs().amax((0, 3)) > 1e-6).all()


@quick
@given(sides, sides, st.integers(2, 4))
def test_padding_equals_padding_by_hand(height: int, width: int, s: int) -> None:
    layer, x = layer_and_input(height, width, window_size=s)
    by_hand = layer(F.pad(x, (0, 0, 0, -width % s, 0, -height % s)))
    torch.testing.assert_close(layer(x), by_hand[:, :height, :width])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_branches_are_the_two_halves_of_the_output(alpha: float) -> None:
    layer, x = layer_and_input(5, 4, alpha=alpha)
    high, low = layer.branches(x)
    assert high.shape[-1] == layer.high_dim
    assert low.shape[-1] == layer.low_dim
    assert torch.equal(torch.cat([high, low], -1), layer(x))


def test_sequences_and_grids_of_any_stride_agree() -> None:
    layer, x = layer_and_input(4, 6)
    expected = layer(x)
    torch.testing.assert_close(layer(x.flatten(1, 2), 4, 6), expected.flatten(1, 2))
    torch.testing.assert_close(layer(x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)), expected)


@pytest.mark.parametrize(("heads", "alpha", "low"), [(3, 0.9, 2), (12, 0.9, 10), (4, 0.0, 0), (4, 1.0, 4), (5, 0.5, 2)])
def test_share_of_low_heads_is_truncated(heads: int, alpha: float, low: int) -> None:
    layer = HiLoAttention(4 * heads, heads, alpha=alpha)
    assert layer.low_heads == low
    names = {name.split(".")[0] for name, _ in layer.named_parameters()}
    assert names == ({"l_q", "l_kv", "l_proj"} if low else set()) | ({"h_qkv", "h_proj"} if low < heads else set())


def test_counts() -> None:
    assert HiLoAttention(384, 12).flops(14, 14) == 83_467_776
    assert HiLoAttention(384, 12).flops(13, 14) == 83_467_776  # padded to 14
    dense = HiLoAttention(384, 12, window_size=1)
    assert dense.flops(14, 14) == 4 * 196 * 384**2 + 2 * 196**2 * 384

    def size(alpha: float) -> int:
        return sum(p.numel() for p in HiLoAttention(20, 10, qkv_bias=True, alpha=alpha).parameters())

    for share in (0.0, 0.1, 0.2, 0.4):
        assert size(share) == size(1 - share)


def test_gradients_reach_every_parameter_and_token() -> None:
    for options in ({}, {"window_size": 1}, {"alpha": 0.0}, {"alpha": 1.0}, {"window_size": 3}):
        layer, x = layer_and_input(4, 5, **options)
        x.requires_grad_()
        layer(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
        assert x.grad is not None
        assert (x.grad.abs().amax(-1) > 0).all()


def test_gradients_are_those_of_the_function() -> None:
    layer, x = layer_and_input(3, 4)
    assert torch.autograd.gradcheck(layer.double(), x[:1].double().requires_grad_())


def test_state_dict_round_trip() -> None:
    layer, x = layer_and_input(4, 4)
    other = HiLoAttention(16, 4, qkv_bias=True)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(other(x), layer(x))


def test_half_precision() -> None:
    layer, x = layer_and_input(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), layer(x), rtol=0.1, atol=0.1)
    half = layer.bfloat16()(x.bfloat16())
    torch.testing.assert_close(half.float(), mixed.float(), rtol=0.1, atol=0.1)


def test_an_empty_batch_passes() -> None:
    layer, _ = layer_and_input(4, 4)
    assert layer(torch.empty(0, 4, 4, 16)).shape == (0, 4, 4, 16)


def test_exports() -> None:
    layer, x = layer_and_input(4, 4)
    exported = torch.export.export(layer.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), layer(x), **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "dim=16 is not divisible by num_heads=3"),
        ({"window_size": 0}, "window_size=0 must be an integer >= 1"),
        ({"window_size": 2.0}, "window_size=2.0 must be an integer"),
        ({"alpha": 1.1}, r"alpha=1.1 must lie in \[0, 1\]"),
        ({"alpha": -0.1}, r"alpha=-0.1 must lie in \[0, 1\]"),
        ({"alpha": float("nan")}, "alpha=nan must lie in"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiLoAttention(16, **{"num_heads": 4} | options)


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((2, 16, 4, 5), (), "channels come last"),
        ((2, 24, 16), (4, 5), r"height=4, width=5: give \(B, H, W, C\)"),
        ((2, 24, 16), (), "height=None, width=None"),
        ((2, 4, 6, 16), (6, 4), "height=6, width=4"),
        ((24, 16), (), "give"),
    ],
)
def test_bad_input(shape: tuple[int, ...], grid: tuple[int, ...], message: str) -> None:
    layer, _ = layer_and_input(4, 4)
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape), *grid)


def test_drops_into_the_vit_host_and_learns_there() -> None:
    torch.manual_seed(0)
    model = heed.create_model("vit_micro", attention="hilo", attention_options={"alpha": 0.7})
    assert all(block.attn.low_heads == 2 for block in model.blocks)
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


def test_factory_fits_the_grid() -> None:
    assert create_layer("hilo", 16, 4, (8, 8)).window_size == 2
    assert create_layer("hilo", 16, 4, (1, 8)).window_size == 1
    assert create_layer("hilo", 16, 4, (8, 8), window_size=4, qkv_bias=False).h_qkv.bias is None


def test_lofi_carries_less_high_frequency_energy_than_hifi() -> None:
    """A sanity check of the names, with random weights on a smooth field with noise."""
    torch.manual_seed(0)
    layer = HiLoAttention(32, 4, qkv_bias=True)
    field = F.interpolate(torch.randn(2, 32, 4, 4), size=16, mode="bicubic").permute(0, 2, 3, 1)
    high, low = layer.branches(field + 0.3 * torch.randn(2, 16, 16, 32))
    frequency, high_energy = radial_spectrum(high.detach())
    _, low_energy = radial_spectrum(low.detach())
    fast = frequency > 0.25
    assert low_energy[fast].sum() < 0.3 * high_energy[fast].sum()


def test_radial_spectrum_finds_a_wave() -> None:
    wave = torch.sin(2 * torch.pi * torch.arange(16) / 4).expand(1, 16, 16)[..., None]  # a quarter cycle per token
    frequency, energy = radial_spectrum(wave + 3, bins=10)
    assert abs(frequency[energy.argmax()] - 0.25) < 0.04
    assert energy.max() > 0.99 * energy.sum()
    torch.testing.assert_close(energy.sum(), wave.var(correction=0))
    with pytest.raises(ValueError, match="must be"):
        radial_spectrum(torch.ones(4, 4, 2))
