"""SOFT: the Gaussian kernel, its low-rank form, Newton's inverses and their gradients, the layer on any grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import heed
from heed.layers.registry import create_layer
from heed.layers.soft import (
    Landmarks,
    SoftAttention,
    SoftKernel,
    gaussian_kernel,
    newton_inverse,
    normalised_newton_inverse,
)

seeds = st.integers(0, 2**16)


def spread_kernel(seed: int, m: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """(2, 3, m, m), the kernel of landmarks so far apart that Newton's iteration converges."""
    landmarks = 1.5 * torch.randn(2, 3, m, 6, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return gaussian_kernel(landmarks, landmarks)


def queries(height: int, width: int, heads: int = 2, d: int = 4, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, heads, height * width, d), torch.randn(batch, heads, height * width, d)


@settings(max_examples=20)
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_kernel_is_gaussian_symmetric_and_blind_to_shifts(seed: int, n: int, m: int) -> None:
    torch.manual_seed(seed)
    a, b, shift = torch.randn(2, n, 4).double(), torch.randn(2, m, 4).double(), torch.randn(4).double()
    kernel = gaussian_kernel(a, b)
    torch.testing.assert_close(kernel, (-torch.cdist(a, b).square() / 2).exp())
    torch.testing.assert_close(gaussian_kernel(a + shift, b + shift), kernel)
    own = gaussian_kernel(a.float(), a.float())
    torch.testing.assert_close(own, own.transpose(1, 2))
    torch.testing.assert_close(own.diagonal(dim1=1, dim2=2), torch.ones(2, n))
    assert own.min() > 0
    assert own.max() <= 1 + 1e-6


@settings(max_examples=10)
@given(seeds, st.sampled_from([1, 5, 20]))
def test_inverses_are_symmetric(seed: int, iterations: int) -> None:
    for invert in (newton_inverse, normalised_newton_inverse):
        inverse = invert(spread_kernel(seed), iterations)
        torch.testing.assert_close(inverse, inverse.transpose(-1, -2))


@settings(max_examples=10)
@given(seeds)
def test_converged_newton_is_the_inverse_with_its_gradient(seed: int) -> None:
    kernel = spread_kernel(seed).requires_grad_()
    probe = torch.randn_like(kernel)
    ridge = 0.01 * torch.eye(5, dtype=kernel.dtype)
    for invert, exact in (
        (newton_inverse, torch.linalg.inv(kernel + ridge)),
        (normalised_newton_inverse, torch.linalg.inv(kernel)),
    ):
        ours = invert(kernel, 60)
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)
        (gradient,), (wanted,) = (torch.autograd.grad(y, kernel, probe, retain_graph=True) for y in (ours, exact))
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3)


def test_the_gradient_is_one_formula_whatever_the_count() -> None:
    kernel = spread_kernel(0).requires_grad_()
    probe = torch.randn_like(kernel)
    kept = []
    for iterations in (1, 20):
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=tensors: to.append(x) or x, lambda x: x):
            y = newton_inverse(kernel, iterations)
        kept.append(sum(x.numel() for x in tensors))
        (gradient,) = torch.autograd.grad(y, kernel, probe)
        yt = y.transpose(-1, -2)
        torch.testing.assert_close(gradient, -(yt @ probe @ yt))
    assert kept == [kernel.numel()] * 2


@pytest.mark.parametrize("scale", [1.5, 0.05])
def test_normalised_newton_is_the_authors_loop(scale: float) -> None:
    landmarks = scale * torch.randn(2, 3, 6, 4, dtype=torch.float64)
    kernel = gaussian_kernel(landmarks, landmarks)
    if scale < 1:  # with column sums above all row sums, the first start is too large and is halved
        kernel = kernel + 0.2 * torch.rand_like(kernel).tril(-1)
    alpha = 2 / kernel.sum(-1).max().square()
    identity = torch.eye(6, dtype=torch.float64)
    trials = 0
    while (identity - kernel @ (alpha * kernel)).abs().sum(-2).max() > 1.01 and trials < 10:
        alpha, trials = alpha / 2, trials + 1
    inverse = alpha * kernel
    for _ in range(20):
        inverse = 2 * inverse - inverse @ kernel @ inverse
    torch.testing.assert_close(normalised_newton_inverse(kernel, 20), inverse)
    assert trials > 0 or scale > 1


def test_a_sample_of_the_batch_can_be_on_its_own() -> None:
    near, far = torch.randn(1, 2, 6, 4), 3 * torch.randn(1, 2, 6, 4)
    kernel = torch.cat([gaussian_kernel(x, x) for x in (near, far)])
    for per_sample in (True, False):
        together = normalised_newton_inverse(kernel, 3, per_sample=per_sample)[1:]
        alone = normalised_newton_inverse(kernel[1:], 3, per_sample=per_sample)
        assert torch.allclose(together, alone) is per_sample


def test_low_rank_meets_the_dense_kernel() -> None:
    """Exactly where every token is a landmark, and the better the more landmarks there are on a smooth field."""
    field = F.interpolate(torch.randn(1, 4, 4, 4), size=16, mode="bicubic").double()
    q, v = field.flatten(2).transpose(1, 2)[:, None], torch.randn(1, 1, 256, 3).double()
    dense = gaussian_kernel(q, q) @ v

    def error(side: int) -> float:
        landmarks = F.adaptive_avg_pool2d(field, side).flatten(2).transpose(1, 2)[:, None]
        mixed = Landmarks.between(q, landmarks, torch.linalg.inv).mix(v)
        return ((mixed - dense).norm() / dense.norm()).item()

    errors = [error(side) for side in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2]
    few = q[:, :, ::16]
    kernel = gaussian_kernel(few, few)
    exact = Landmarks.between(few, few, torch.linalg.inv).mix(v[:, :, ::16])
    torch.testing.assert_close(exact, kernel @ v[:, :, ::16], rtol=1e-5, atol=1e-5)


@settings(max_examples=10)
@given(seeds, st.booleans())
def test_tokens_have_no_order_once_the_landmarks_are_given(seed: int, normalised: bool) -> None:
    torch.manual_seed(seed)
    q, v = queries(4, 6)
    order = torch.randperm(24)
    landmarks = torch.randn(2, 2, 3, 4)
    first = Landmarks.between(q, landmarks).mix(v, normalised)
    other = Landmarks.between(q[:, :, order], landmarks).mix(v[:, :, order], normalised)
    torch.testing.assert_close(other, first[:, :, order], rtol=1e-4, atol=1e-4)
    dense = SoftKernel(4, 2, 1, normalised=normalised)
    torch.testing.assert_close(dense(q[:, :, order], v[:, :, order], 4, 6), dense(q, v, 4, 6)[:, :, order])


@settings(max_examples=10)
@given(seeds, st.booleans(), st.integers(2, 4), st.sampled_from([0, 3]))
def test_no_values_give_nothing(seed: int, normalised: bool, ratio: int, conv_size: int) -> None:
    torch.manual_seed(seed)
    kernel = SoftKernel(4, 2, ratio, conv_size, normalised=normalised)
    q, v = queries(5, 7)
    assert not kernel(q, torch.zeros_like(v), 5, 7).any()


def test_the_dense_form_by_hand() -> None:
    q, v = queries(2, 3)
    similarity = (-torch.cdist(q, q).square() / 2 / 4**0.5).exp()
    torch.testing.assert_close(SoftKernel(4, 2, 1)(q, v, 2, 3), similarity @ v)
    root = similarity.sum(-1, keepdim=True).rsqrt()
    torch.testing.assert_close(SoftKernel(4, 2, 1, normalised=True)(q, v, 2, 3), root * similarity @ (root * v))


@pytest.mark.parametrize("normalised", [False, True])
def test_exact_inverse_is_what_newton_tends_to(normalised: bool) -> None:
    kernel = SoftKernel(6, 2, 4, iterations=60, normalised=normalised).double()
    q, v = (x.double() for x in queries(4, 8, d=6))
    newton = kernel(q, v, 4, 8)
    kernel.exact = True
    torch.testing.assert_close(newton, kernel(q, v, 4, 8), rtol=1e-5, atol=1e-5)
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: kernel(q, v, 4, 8), q)


def test_landmarks_have_a_number_of_their_own() -> None:
    fixed, free = SoftKernel(4, 2, 2, num_landmarks=9), SoftKernel(4, 2, 2)
    fixed.load_state_dict(free.state_dict())
    q, v = queries(6, 6)
    torch.testing.assert_close(fixed(q, v, 6, 6), free(q, v, 6, 6))  # 3 x 3 landmarks either way
    for height, width in ((12, 10), (2, 3), (1, 9)):
        q, v = queries(height, width)
        assert fixed.low_rank(q, height, width).landmarks.shape == (2, 2, 9, 4)
        assert fixed(q, v, height, width).shape == v.shape
    assert free.low_rank(*queries(12, 11)[:1], 12, 11).landmarks.shape == (2, 2, 30, 4)  # floor(12/2) * floor(11/2)


def test_sequences_and_grids_agree() -> None:
    layer, x = SoftAttention(8, 2, 2, 3), torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(layer(x.flatten(1, 2), 4, 6), layer(x).flatten(1, 2))


@pytest.mark.parametrize("normalised", [False, True])
def test_half_precision(normalised: bool) -> None:
    layer, x = SoftAttention(8, 2, 2, 3, normalised=normalised), torch.randn(2, 4, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    torch.testing.assert_close(mixed.float(), layer(x), rtol=0.1, atol=0.1)
    for dtype in (torch.bfloat16, torch.float16):
        half = layer.to(dtype)(x.to(dtype))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), mixed.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("normalised", [False, True])
def test_exports(normalised: bool) -> None:
    layer, x = SoftAttention(8, 2, 2, 3, normalised=normalised).eval(), torch.randn(1, 4, 4, 8)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "dim=16 is not divisible by num_heads=3"),
        ({"ratio": 0}, "ratio=0 must be at least 1"),
        ({"conv_size": 4}, "conv_size=4 must be odd"),
        ({"conv_size": -3}, "conv_size=-3 must be odd"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"inverse": "exakt"}, "unknown inverse 'exakt'; did you mean 'exact'"),
        ({"num_landmarks": 48}, "num_landmarks=48 must be a square number"),
        ({"num_landmarks": 0}, "num_landmarks=0 must be a square number"),
        ({"num_landmarks": 4, "ratio": 1}, "does not go with ratio=1"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftAttention(16, **{"num_heads": 4} | options)


def test_bad_input() -> None:
    layer = SoftAttention(8, 2, 4)
    for x, grid, message in (
        (torch.zeros(1, 4, 4, 9), (), "dim=8, the input has 9 channels"),
        (torch.zeros(1, 24, 8), (5, 5), "24 tokens do not fill a grid of height=5, width=5"),
        (torch.zeros(1, 24, 8), (), "height=None, width=None"),
        (torch.zeros(1, 3, 8, 8), (), "a grid of 3 x 8 tokens holds no patch of ratio=4"),
        (torch.full((1, 4, 4, 8), torch.nan), (), "SoftKernel: the queries are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, *grid)
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"iterations={count}"):
            newton_inverse(torch.eye(3), count)
    with pytest.raises(ValueError, match="no landmarks"):
        SoftKernel(4, 2, 1).low_rank(torch.zeros(1, 2, 4, 4), 2, 2)


@pytest.mark.parametrize(("side", "ratio", "conv_size"), [(1, 1, 3), (4, 2, 3), (14, 2, 3), (28, 4, 5), (56, 8, 9)])
def test_factory_fits_the_grid(side: int, ratio: int, conv_size: int) -> None:
    layer = create_layer("soft", 16, 4, (side, side))
    assert isinstance(layer, SoftAttention)
    assert layer.kernel.conv is not None
    assert layer.kernel.ratio == ratio
    assert layer.kernel.conv.kernel_size == (conv_size, conv_size)
    assert layer(torch.randn(1, side, side, 16)).shape == (1, side, side, 16)


def test_drops_into_the_vit_host_and_learns_there() -> None:
    model = heed.create_model("vit_micro", attention="soft", depth=2)
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
