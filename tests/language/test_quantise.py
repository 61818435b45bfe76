"""Quantisers: round trips, exact extremes, packing, and what they cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heed.language.quantise import Grouping, channel_scale, pack, parameter_count, quantise, unpack

GROUPINGS: tuple[Grouping, ...] = ("channel", "token", "group", "channel-separable")
groupings = pytest.mark.parametrize("per", GROUPINGS)


def numbers(batch: int = 2, tokens: int = 7, channels: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_packing_loses_nothing(bits: int, batch: int, bytes_: int, seed: int) -> None:
    shape = (batch, 3, bytes_ * 8 // bits)
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] * 8 == codes.shape[-1] * bits
    assert torch.equal(unpack(packed, bits), codes)


def test_where_the_codes_lie_in_a_byte() -> None:
    codes = torch.arange(8, dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [j + 16 * (j + 4) for j in range(4)]
    codes = codes % 4
    assert pack(codes, 2).tolist() == [
        sum(4**m * int(codes[j + 2 * m]) for m in range(4)) for j in range(2)
    ]  # fmt: skip


@settings(max_examples=25)
@given(st.sampled_from(GROUPINGS), st.sampled_from([2, 4, 8]), st.integers(1, 6), st.integers(0, 99))
def test_errors_stay_within_half_a_step(per: Grouping, bits: int, tokens: int, seed: int) -> None:
    x = numbers(tokens=tokens, seed=seed)
    found = quantise(x, bits, per, group=4)
    step = found.step
    if per == "group":
        step = step.repeat_interleave(4, -1)
    if found.scale is not None:
        step = step * found.scale
    assert ((found.dequantise() - x).abs() <= step / 2 + 1e-5).all()


@groupings
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_extremes_are_exact(per: Grouping, bits: int) -> None:
    x = numbers()
    y = quantise(x, bits, per, group=4).dequantise()
    if per == "channel-separable":
        x, y = x / channel_scale(x), y / channel_scale(x)
    shape, over = ((2, 7, 4, 4), -1) if per == "group" else (x.shape, 1 if per == "channel" else -1)
    for extreme in (torch.amin, torch.amax):
        torch.testing.assert_close(extreme(y.view(shape), over), extreme(x.view(shape), over))


@groupings
def test_constants_and_zeros_come_back(per: Grouping) -> None:
    x = torch.zeros(2, 5, 8)
    x[:, :, 3] = 2.5
    for case in (x, x[:, :1], torch.zeros_like(x)):
        found = quantise(case, 2, per, group=4)
        assert found.dequantise().isfinite().all()
    torch.testing.assert_close(quantise(x, 2, "channel").dequantise(), x)
    assert (quantise(torch.zeros(1, 2, 8), 4, per, group=8).codes() == 0).all()


@groupings
def test_rows_of_a_batch_do_not_depend_on_each_other_unless_they_share(per: Grouping) -> None:
    x = numbers()
    x[1] *= 50
    alone, together = quantise(x[:1], 4, per, group=4), quantise(x, 4, per, group=4)
    assert torch.equal(alone.dequantise(), together.dequantise()[:1])
    shared = quantise(x, 4, per, group=4, shared=True)
    assert torch.equal(quantise(x[:1], 4, per, group=4, shared=True).packed, alone.packed)
    if per in ("channel", "channel-separable"):
        assert not torch.equal(shared.packed[:1], alone.packed)


@groupings
def test_padding_does_not_count(per: Grouping) -> None:
    x = numbers(tokens=6)
    x[:, 4:] = 100.0
    tokens = torch.arange(6).expand(2, 6) < 4
    found = quantise(x, 4, per, group=4, tokens=tokens).dequantise()
    torch.testing.assert_close(found[:, :4], quantise(x[:, :4], 4, per, group=4).dequantise())
    assert quantise(x, 4, per, group=4, tokens=torch.zeros_like(tokens)).dequantise().isfinite().all()


@groupings
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_are_stored_in_the_dtype_of_the_numbers(per: Grouping, dtype: torch.dtype) -> None:
    x = numbers().to(dtype)
    found = quantise(x, 8, per, group=4)
    assert found.low.dtype == found.step.dtype == found.dequantise().dtype == dtype
    assert (found.dequantise() - x).abs().max() < 0.1


@groupings
def test_parameters_are_as_many_as_counted(per: Grouping) -> None:
    x = numbers(1, 12, 64)
    found = quantise(x, 4, per)
    stored = found.low.numel() + found.step.numel() + (0 if found.scale is None else found.scale.numel())
    assert stored == parameter_count(per, 12, 64)


def test_channel_separable_needs_fewer_parameters_than_groups_and_is_better_than_tokens() -> None:
    assert parameter_count("group", 4096, 4096) == 2 * 4096 * 4096 // 32
    assert parameter_count("channel-separable", 4096, 4096) == 2 * 4096 + 4096
    x = numbers(1, 64, 64) * torch.logspace(-1.5, 1.5, 64)  # channels of different size, as in real keys and values
    size = torch.logspace(-1.5, 1.5, 64)
    losses = {
        per: ((quantise(x, 4, per).dequantise() - x) / size).square().mean() for per in ("token", "channel-separable")
    }
    assert losses["channel-separable"] < 0.5 * losses["token"]


def test_bad_input() -> None:
    x = numbers()
    with pytest.raises(ValueError, match="bits=3 cannot be packed; choose 2, 4 or 8"):
        quantise(x, 3)
    with pytest.raises(ValueError, match="unknown quantisation 'chanel'; did you mean 'channel'"):
        quantise(x, 4, "chanel")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="6 channels of 2 bits do not fill whole bytes"):
        quantise(x[..., :6], 2)
    with pytest.raises(ValueError, match="group=5 does not divide the 16 channels"):
        quantise(x, 4, "group", group=5)
