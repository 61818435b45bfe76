"""What every language model of this room must do, on bytes. A model is one line: its name and settings that make it tiny."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import heed
from heed.models import HeedModel, from_pretrained

# name: settings; every model maps ids (B, 32) to logits (B, 32, 256) and keeps what else it wants to lose in auxiliary_loss.
MODELS: dict[str, dict[str, Any]] = {
    "routing_tiny": {"dim": 32, "ffn_dim": 32, "clusters": 4, "window": 8, "block": (8,), "max_relative": 9},
    "routing_package": {
        "dim": 32, "layers": 2, "heads": 4, "head_dim": 8, "local_heads": 2, "length": 32, "window": 8, "local_window": 8,
    },
}  # fmt: skip


@pytest.fixture(params=MODELS, ids=str)
def model(request: pytest.FixtureRequest) -> HeedModel:
    return heed.create_model(request.param, **MODELS[request.param])


def text(rows: int = 4) -> Tensor:
    """(rows, 33) bytes in which every second one repeats."""
    line = torch.tensor(list(b"abacadaeafagahaiajakalamanaoapaqarasatauavaw"))
    return torch.stack([line[2 * i : 2 * i + 33] for i in range(rows)])


def loss_of(model: HeedModel, ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + model.auxiliary_loss  # type: ignore[operator]


def test_logits_have_the_shape_of_the_vocabulary(model: HeedModel) -> None:
    assert model(text()[:, :-1]).shape == (4, 32, 256)


def test_learns_with_the_usual_lines(model: HeedModel) -> None:
    ids = text()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(25):
        loss = loss_of(model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_evaluation_changes_nothing_and_repeats(model: HeedModel) -> None:
    model.train()
    loss_of(model, text()).backward()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    first = model(text()[:, :-1])
    assert torch.equal(first, model(text()[:, :-1]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_state_comes_back_from_a_folder_and_a_copy(model: HeedModel, tmp_path: Path) -> None:
    loss_of(model, text()).backward()  # what a forward pass leaves behind is neither copied nor saved
    model.eval()
    expected = model(text()[:, :-1])
    model.save_pretrained(tmp_path)
    for other in (from_pretrained(tmp_path), copy.deepcopy(model)):
        assert torch.equal(other(text()[:, :-1]), expected)


def test_bfloat16_autocast_runs(model: HeedModel) -> None:
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(text()[:, :-1])
    assert torch.isfinite(low).all()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model.train(), text()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_gradients_reach_every_parameter(model: HeedModel) -> None:
    loss_of(model, text()).backward()
    learning = {key: p.grad for key, p in model.named_parameters() if p.requires_grad and p.numel()}
    assert {key for key, gradient in learning.items() if gradient is None or not gradient.any()} == set()
