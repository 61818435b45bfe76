"""FFNet for super-resolution and for forecasting: invariants, checkpoints, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import heed
from heed.predict.ffnet_series import FFNetSeries, RevIN
from heed.predict.ffnet_sr import FFNetSR, fft_loss

GOLDEN = Path(__file__).parents[1] / "golden" / "53-metamixer"
SERIES: dict[str, Any] = {
    "length": 32, "horizon": 12, "variables": 3, "dims": (8,), "kernels": (11,), "affine": True
}  # fmt: skip


def enlarger(**overrides: Any) -> FFNetSR:
    return cast(FFNetSR, heed.create_model("ffnet_sr", **{"dim": 8, "depth": 2} | overrides))


def forecaster(**overrides: Any) -> FFNetSeries:
    return cast(FFNetSeries, heed.create_model("ffnet_series", **SERIES | overrides))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9))
@torch.no_grad()
def test_without_detail_pixels_are_repeated(scale: int, channels: int, height: int, width: int) -> None:
    model = enlarger(scale=scale, in_chans=channels).eval()
    nn.init.zeros_(model.conv_bef_up.weight)
    nn.init.zeros_(cast(Tensor, model.conv_bef_up.bias))
    x = torch.rand(2, channels, height, width)
    assert torch.equal(model(x), F.interpolate(x, scale_factor=scale, mode="nearest"))


def test_published_sizes() -> None:
    with torch.device("meta"):
        depths = [len(cast(FFNetSR, heed.create_model(name)).body) for name in ("ffnet_sr_light", "ffnet_sr")]
    assert depths == [36, 48]


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_norms_of_super_resolution(norm: str) -> None:
    model = enlarger(norm=norm)
    F.l1_loss(model(torch.rand(2, 3, 6, 7)), torch.rand(2, 3, 12, 14)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_fft_loss() -> None:
    image, target = torch.rand(2, 3, 8, 6, requires_grad=True), torch.rand(2, 3, 8, 6)
    assert fft_loss(target, target) == 0
    difference = torch.fft.rfft2(image - target)
    mean = (difference.real.abs().mean() + difference.imag.abs().mean()) / 2
    torch.testing.assert_close(fft_loss(image, target, 0.5), 0.5 * mean)
    fft_loss(image, target).backward()
    assert image.grad is not None


@torch.no_grad()
def test_loads_the_authors_super_resolution(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "super_resolution.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    torch.save({"state_dict": state}, tmp_path / "sr.pth")
    model = FFNetSR.from_authors(tmp_path / "sr.pth", "ffnet_sr_light", dim=12, depth=2)
    torch.testing.assert_close(model(tensors["input.x"]), tensors["output.y"], rtol=1e-4, atol=2e-5)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(heed.from_pretrained(tmp_path / "saved")(tensors["input.x"]), model(tensors["input.x"]))


@torch.no_grad()
def test_loads_the_authors_forecaster_and_fuses(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "time_series.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    torch.save(state, tmp_path / "checkpoint.pth")
    model = FFNetSeries.from_authors(tmp_path / "checkpoint.pth", "ffnet_series", **SERIES)
    torch.testing.assert_close(model(tensors["input.x"]), tensors["output.y"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(model.fuse()(tensors["input.x"]), tensors["output.y"], rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == forecaster(fused=True).state_dict().keys()
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        forecaster().fuse()


@settings(max_examples=8, deadline=None)
@given(st.floats(0.1, 10), st.floats(-5, 5), st.booleans())
@torch.no_grad()
def test_forecasts_scale_and_shift_with_the_series(factor: float, offset: float, subtract_last: bool) -> None:
    model = forecaster(affine=False, subtract_last=subtract_last).double().eval()
    assert model.revin is not None
    model.revin.eps = 0.0
    x = torch.randn(2, 32, 3, dtype=torch.float64)
    torch.testing.assert_close(model(factor * x + offset), factor * model(x) + offset)


@torch.no_grad()
def test_normalisation_is_undone() -> None:
    revin = RevIN(3, affine=True)
    nn.init.uniform_(cast(Tensor, revin.weight), 1, 2)
    x = torch.randn(2, 16, 3)
    statistics = revin.statistics(x)
    torch.testing.assert_close(revin.inverse(revin(x, *statistics), *statistics), x)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(4, 12), st.integers(1, 3))
def test_any_patches_and_stages(variables: int, stride: int, count: int, stages: int) -> None:
    model = forecaster(
        length=stride * count, variables=variables, patch=stride + 1, stride=stride, dims=(4, 6, 8)[:stages],
        depths=(1,) * stages, kernels=(5,) * stages, small_kernels=(3,) * stages,
    )  # fmt: skip
    y = model(torch.randn(2, stride * count, variables))
    assert y.shape == (2, 12, variables)
    y.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.features(torch.randn(2, stride * count, variables)).shape[1:] == (
        variables, (4, 6, 8)[stages - 1], model.config.patches
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: forecaster(length=31), "length=31 is no multiple of stride=2; 30 or 32 steps would do"),
        (lambda: forecaster(length=2), "length=2 is shorter than a patch; at least 4"),
        (lambda: forecaster(stride=5), "stride=5 must be from 1 to patch=4"),
        (lambda: forecaster(kernels=(11, 11)), r"kernels=\(11, 11\) needs one entry for each of dims"),
        (lambda: forecaster(kernels=(10,)), "kernel=10"),
        (lambda: forecaster()(torch.zeros(2, 32, 4)), r"takes series \(B, 32, 3\) of 32 steps and 3 variables"),
        (lambda: forecaster()(torch.zeros(2, 30, 3)), "of 32 steps"),
        (lambda: enlarger(norm="group"), "unknown norm 'group'"),
        (lambda: enlarger(scale=0), "scale=0 must be at least 1"),
        (lambda: enlarger()(torch.zeros(3, 8, 8)), r"takes images \(B, 3, H, W\)"),
        (lambda: enlarger()(torch.zeros(1, 3, 0, 8)), r"input \(1, 3, 0, 8\)"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
