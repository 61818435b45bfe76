"""Neighborhood attention inside diffusers' own Flux transformer, built small."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heed.diffusion.neighborhood import NeighborhoodFluxProcessor

diffusers = pytest.importorskip("diffusers")
GRID, TEXT = (5, 6), 4


def transformer(double: int = 1, single: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=False,
    ).eval()


def inputs() -> dict[str, Tensor]:
    rows, columns = torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
    return {
        "hidden_states": torch.randn(2, GRID[0] * GRID[1], 8),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": places,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def run(model: torch.nn.Module, given: dict[str, Tensor]) -> Tensor:
    return model(**given, return_dict=False)[0]


def test_windows_as_large_as_the_grid_are_flux_itself() -> None:
    model, given = transformer(), inputs()
    want = run(model, given)
    model.set_attn_processor(NeighborhoodFluxProcessor(GRID, GRID))
    torch.testing.assert_close(run(model, given), want, rtol=1e-4, atol=1e-5)


def test_a_token_sees_its_window_and_the_text() -> None:
    model, given = transformer(single=0), inputs()
    model.set_attn_processor(NeighborhoodFluxProcessor(GRID, 3))
    before = run(model, given).unflatten(1, GRID)
    image = {**given, "hidden_states": given["hidden_states"].clone()}
    image["hidden_states"].unflatten(1, GRID)[:, 0, 0] += 1
    changed = (run(model, image).unflatten(1, GRID) - before).abs().amax((0, 3)) > 1e-6
    assert changed[:2, :2].all()
    assert not changed[3:].any()
    assert not changed[:, 3:].any()
    text = {**given, "encoder_hidden_states": given["encoder_hidden_states"] + 1}
    assert ((run(model, text).unflatten(1, GRID) - before).abs().amax((0, 3)) > 1e-6).all()


def test_gradients_reach_image_and_text() -> None:
    model, given = transformer(), inputs()
    model.set_attn_processor(NeighborhoodFluxProcessor(GRID, 3, stride=2))
    leaves = [given[name].requires_grad_() for name in ("hidden_states", "encoder_hidden_states")]
    for grad in torch.autograd.grad(run(model, given).square().sum(), leaves):
        assert torch.isfinite(grad).all()
        assert grad.any()


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="axis 0"):
        NeighborhoodFluxProcessor(GRID, 6)
    model, given = transformer(), inputs()
    model.set_attn_processor(NeighborhoodFluxProcessor((9, 9), 3))
    with pytest.raises(ValueError, match="fewer than the 81 image tokens"):
        run(model, given)
    model.set_attn_processor(NeighborhoodFluxProcessor(GRID, 3))
    model.fuse_qkv_projections()
    model.set_attn_processor(NeighborhoodFluxProcessor(GRID, 3))
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        run(model, given)
