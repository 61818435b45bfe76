"""The map of what a layer or model attends to: exact, zero where nothing flows, and the same for every mechanism."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import heed
from heed.engine.patterns import Blocks, Pattern
from heed.explain.attention import attention_map, layer_attention
from heed.layers.attention import PatternAttention
from heed.layers.registry import layers


class _Blocked(PatternAttention):
    def pattern(self, layout: tuple[int, ...]) -> Pattern:
        return Blocks((2, 3), grid=layout)


def _tokens(rows: int = 6, columns: int = 6, channels: int = 16) -> torch.Tensor:
    return torch.randn(rows, columns, channels, generator=torch.Generator().manual_seed(0))


def test_vanishes_outside_a_known_pattern() -> None:
    torch.manual_seed(0)
    got = layer_attention(_Blocked(16, 2), _tokens(), (3, 4))
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[2:4, 3:6] = True
    assert (got[inside] > 0).all()
    assert (got[~inside] == 0).all()
    torch.testing.assert_close(got.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("query", [(0, 0), (3, 4), (5, 2)])
def test_neighborhood_vanishes_outside_the_window(query: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = heed.create_layer("neighborhood", 16, 2, (6, 6), kernel_size=3)
    inside = layer.pattern((6, 6)).mask(36)[query[0] * 6 + query[1]].view(6, 6)
    assert torch.equal(layer_attention(layer, _tokens(), query) > 0, inside)


def test_is_the_norm_of_the_jacobian() -> None:
    torch.manual_seed(0)
    layer = heed.create_layer("softmax", 8, 2, (2, 3)).double()
    x = _tokens(2, 3, 8).double()
    jacobian = torch.autograd.functional.jacobian(lambda t: layer(t[None])[0, 1, 2], x)  # (C, H, W, C)
    norms = jacobian.square().sum((0, 3)).sqrt()
    torch.testing.assert_close(layer_attention(layer, x, (1, 2)), (norms / norms.sum()).float())


def test_random_directions_estimate_the_exact_map() -> None:
    torch.manual_seed(0)
    layer = heed.create_layer("softmax", 16, 2, (6, 6))
    exact = layer_attention(layer, _tokens(), (2, 2))
    generator = torch.Generator().manual_seed(1)
    guess = layer_attention(layer, _tokens(), (2, 2), directions=2000, generator=generator)
    torch.testing.assert_close(guess, exact, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("name", layers.names())
@pytest.mark.parametrize("query", [(5, 1), None])
def test_every_layer_in_the_host(name: str, query: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    model = heed.create_model("vit_micro", attention=name, patch_size=1, depth=1, dim=16, num_heads=2, drop_path=0.5)
    model.train()
    got = attention_map(model, torch.randn(1, 8, 8), query)
    assert got.shape == (8, 8)
    assert (got >= 0).all()
    torch.testing.assert_close(got.sum(), torch.tensor(1.0))
    assert all(part.training for part in model.modules()), "the mode must be left as it was"
    assert all(weight.grad is None for weight in model.parameters())


def test_one_local_block_reaches_its_window_only() -> None:
    torch.manual_seed(0)
    options = {"kernel_size": 3}
    model = heed.create_model(
        "vit_micro", attention="neighborhood", attention_options=options, depth=1, patch_size=2, img_size=16
    )
    got = attention_map(model, torch.randn(1, 16, 16), (9, 9))  # pixel (9, 9) lies in patch (4, 4)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[3:6, 3:6] = True
    assert torch.equal(got > 0, inside)


def test_bad_input_is_refused() -> None:
    model = heed.create_model("vit_micro", depth=1)
    image = torch.randn(1, 8, 8)
    with pytest.raises(ValueError, match="one image"):
        attention_map(model, image[None])
    with pytest.raises(ValueError, match=r"query=\(8, 0\) lies outside the 8 x 8"):
        attention_map(model, image, (8, 0))
    with pytest.raises(ValueError, match="directions=0"):
        attention_map(model, image, directions=0)
    with pytest.raises(ValueError, match="one grid"):
        layer_attention(nn.Identity(), image[None])
