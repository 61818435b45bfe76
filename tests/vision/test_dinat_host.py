"""transformers' own Dinat classes run on heed's engine and give the numbers their equations say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import heed
from heed.engine.patterns import Neighborhood
from heed.vision.dinat_host import DinatAttention

transformers = pytest.importorskip("transformers")
EXACT = {"rtol": 1e-4, "atol": 1e-5}


def tiny(**options: Any) -> Any:
    settings = {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "kernel_size": 3, "dilations": [[1, 2], [1]]}
    return transformers.DinatConfig(**{**settings, "drop_path_rate": 0.0, **options})


def build(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    with heed.apply(kind, DinatAttention()):
        model = kind(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            nn.init.normal_(parameter)  # so that a wrong offset would show
    return model


def dense(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
    """What the layer should compute: every pair of tokens, biased by their offset, outside the window minus infinity."""
    height, width = hidden_states.shape[1:3]
    q, k, v = (
        project(hidden_states).flatten(1, 2).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        for project in (self.query, self.key, self.value)
    )
    rows, columns = (x.flatten() for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    reach, limit = self.kernel_size - 1, 2 * self.kernel_size - 2
    row_step = torch.div(rows - rows[:, None], self.dilation, rounding_mode="floor") + reach
    column_step = torch.div(columns - columns[:, None], self.dilation, rounding_mode="floor") + reach
    bias = self.rpb[:, row_step.clamp(0, limit), column_step.clamp(0, limit)]
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + bias
    allowed = Neighborhood((height, width), self.kernel_size, self.dilation).mask(height * width, height * width)
    out = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    return (out.transpose(1, 2).reshape(hidden_states.shape),)


def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(transformers.DinatModel, tiny())
    other = copy.deepcopy(model)
    image = torch.randn(2, 3, 40, 28)
    with heed.apply(model, DinatAttention()):
        ours = model(image).last_hidden_state
        ours.square().sum().backward()
    for layer in other.modules():
        if type(layer).__name__ == "NeighborhoodAttention":
            monkeypatch.setattr(layer, "forward", dense.__get__(layer))
    expected = other(image).last_hidden_state
    expected.square().sum().backward()
    torch.testing.assert_close(ours, expected, **EXACT)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
def test_with_and_without_the_weights() -> None:
    model = build(transformers.DinatForImageClassification, tiny(num_labels=5))
    image = torch.randn(1, 3, 32, 32)
    with heed.apply(model, DinatAttention()):
        plain, seen = model(image), model(image, output_attentions=True)
    torch.testing.assert_close(plain.logits, seen.logits, **EXACT)
    assert seen.attentions[0].shape == (1, 2, 8, 8, 9)
    torch.testing.assert_close(seen.attentions[0].sum(-1), torch.ones(1, 2, 8, 8))


@torch.no_grad()
def test_a_checkpoint_loads_and_the_backbone_runs(tmp_path: Path) -> None:
    saved = build(transformers.DinatForImageClassification, tiny(num_labels=5))
    saved.save_pretrained(tmp_path)
    image = torch.randn(1, 3, 32, 32)
    with heed.apply(transformers.DinatForImageClassification, DinatAttention()):
        loaded = transformers.DinatForImageClassification.from_pretrained(tmp_path).eval()
        logits = loaded(image).logits
    with heed.apply(saved, DinatAttention()):
        assert torch.equal(saved(image).logits, logits)
    backbone = build(transformers.DinatBackbone, tiny(out_features=["stage1", "stage2"]))
    with heed.apply(backbone, DinatAttention()):
        maps = backbone(image).feature_maps
    assert [tuple(x.shape) for x in maps] == [(1, 8, 8, 8), (1, 16, 4, 4)]


def test_afterwards_transformers_is_as_it_was() -> None:
    from transformers.models.dinat import modeling_dinat as module

    before = module.requires_backends, module.NeighborhoodAttention.forward
    with heed.apply(transformers.DinatModel, DinatAttention()):
        assert (module.requires_backends, module.NeighborhoodAttention.forward) != before
    assert (module.requires_backends, module.NeighborhoodAttention.forward) == before


def test_other_hosts_are_refused() -> None:
    with pytest.raises(TypeError, match="ViTModel is not one of transformers' Dinat classes"):
        heed.apply(transformers.ViTModel, DinatAttention())
    with pytest.raises(TypeError, match="Linear contains no NeighborhoodAttention"):
        heed.apply(nn.Linear(2, 2), DinatAttention())
