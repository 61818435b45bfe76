"""Sparsifiner: the published counts, checkpoints, timm conversion, token pruning, and its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import heed
from heed.layers.sparsifiner import SparsifinerAttention
from heed.vision.sparsifiner import Sparsifiner, most_attended, predictors, sparsify, sparsity_report
from heed.vision.sparsifiner_training import (
    SCHEDULE,
    LossWeights,
    Teaching,
    basis_l1,
    enter_phase,
    losses,
    teach,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "17-sparsifiner" / "model_attention_only.safetensors"


def micro(**overrides: Any) -> Sparsifiner:
    """65 tokens, a basis of 10."""
    torch.manual_seed(0)
    return cast(Sparsifiner, heed.create_model("sparsifiner_micro", **{"patch_size": 1, "reduce_n": 6} | overrides))


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8)


def test_published_counts() -> None:
    with torch.device("meta"):
        model = heed.create_model("sparsifiner_small")
        deit = timm.create_model("deit_small_patch16_224")
    assert sum(p.numel() for p in model.parameters()) == 22_251_880
    assert sum(p.numel() for part in predictors(model) for p in part.parameters()) == 201_216
    own = {key: value.shape for key, value in model.state_dict().items() if ".mask_predictor." not in key}
    assert own == {key: value.shape for key, value in deit.state_dict().items()}
    rows = sparsity_report(cast(Sparsifiner, model), density=0.5)
    assert sum(row["dense"] for row in rows) == pytest.approx(357.66e6, rel=1e-4)


def test_attention_and_token_sparsity_save_over_sixty_percent() -> None:
    with torch.device("meta"):
        model = cast(Sparsifiner, heed.create_model("sparsifiner_small_pruned"))
    rows = sparsity_report(model, density=0.3)
    assert [row["tokens"] for row in rows] == [197] * 4 + [139] * 3 + [98] * 3 + [69] * 2
    saved = 1 - sum(r["predictor"] + r["up"] + r["attention"] for r in rows) / sum(r["dense"] for r in rows)
    assert saved > 0.6


def test_lvvit_based_model() -> None:
    with torch.device("meta"):
        model = cast(Sparsifiner, heed.create_model("sparsifiner_lvvit_small"))
    dense = sum(p.numel() for name, p in model.named_parameters() if ".mask_predictor." not in name)
    assert dense == pytest.approx(26.2e6, rel=0.02)  # LV-ViT-S, without its head for token labels
    small = micro(stem="conv", patch_size=2, skip=2.0, coef_topk=2)
    assert small(images()).shape == (3, 10)


@torch.no_grad()
def test_loads_the_authors_checkpoint(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN)
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    settings = {"img_size": 16, "patch_size": 4, "num_classes": 5, "dim": 24, "depth": 2, "num_heads": 3,
                "mlp_ratio": 2.0, "keep": (0.3, 0.2), "reduce_n": 2, "coef_topk": 4}  # fmt: skip
    model = Sparsifiner.from_authors(tmp_path / "checkpoint.pth", "sparsifiner_small", **settings)
    torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits"], rtol=1e-4, atol=5e-5)
    with pytest.raises(ValueError, match="does not fit Sparsifiner"):
        Sparsifiner.from_authors(tmp_path / "checkpoint.pth", "sparsifiner_small", **settings | {"reduce_n": 3})
    shared = Sparsifiner.from_authors(
        tmp_path / "checkpoint.pth", "sparsifiner_small", **settings | {"shared_projection": True}
    )
    assert all(part.proj_back_n is None for part in predictors(shared))


@torch.no_grad()
def test_a_timm_vit_becomes_sparse() -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3, reg_tokens=2).eval()
    x = torch.randn(2, 3, 64, 64)
    before = vit(x)
    options = {"reduce_n": 2, "coef_topk": 4}
    torch.testing.assert_close(sparsify(vit, keep=1.0, **options)(x), before, rtol=1e-4, atol=1e-4)
    assert [part.prefix for part in predictors(vit)] == [3, 3]
    sparse = sparsify(vit, keep=0.2, **options)
    assert not torch.allclose(sparse(x), before)
    assert all(isinstance(block.attn, SparsifinerAttention) for block in sparse.blocks)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="Linear has no blocks"):
        sparsify(nn.Linear(1, 1))


@torch.no_grad()
def test_pruned_patches_stay_away() -> None:
    model = micro(prune_at=(1, 2), token_keep=0.5, prune_rows=True).eval()
    run = model.run(images(), trace=True)
    masks = [visit.token_mask for visit in run.visits]
    assert masks[0] is None
    assert [mask.sum(1).unique().tolist() for mask in masks[1:] if mask is not None] == [[32], [16], [16]]
    assert masks[1] is not None
    assert masks[2] is not None
    assert not (masks[2] & ~masks[1]).any()
    assert not run.visits[2].tokens[:, 1:][~masks[2]].any()
    torch.testing.assert_close(model(images() * 0), model.run(images() * 0, trace=True).logits)


def test_the_most_attended_are_the_first_of_equals() -> None:
    weights = torch.tensor([[[0.1, 0.4, 0.4, 0.4, 0.2]]])
    assert most_attended(weights, 2)[0].tolist() == [False, True, True, False, False]
    left = torch.tensor([[True, False, True, True, True]])
    assert most_attended(weights, 3, left)[0].tolist() == [False, False, True, True, True]


def test_phases_and_schedule() -> None:
    model = micro()
    first = enter_phase(model, "attn_recon")
    assert len(first) == 4 * 6
    assert all(part.reconstructing for part in predictors(model))
    second = enter_phase(model, "cls_distill")
    assert len(first) + len(second) == len(list(model.parameters()))
    with pytest.raises(ValueError, match="did you mean 'attn_recon'"):
        enter_phase(model, "attn_recn")
    recon, distill = SCHEDULE
    assert recon.learning_rate(3) == pytest.approx(3e-4)
    assert distill.learning_rate(0) == pytest.approx(8e-5)
    assert recon.learning_rate(0) == recon.learning_rate(5) == pytest.approx(2e-4)
    assert distill.learning_rate(45.0) == pytest.approx(2e-6)


@pytest.mark.parametrize("share", [1, 8])
@pytest.mark.parametrize("distance", ["mse", "kl", "ce"])
def test_predictors_learn_the_teachers_attention(share: int, distance: str) -> None:
    model, x, weights = micro(share=share, depth=2), images(), LossWeights(distance=distance).for_phase("attn_recon")
    with torch.no_grad():
        for block in model.blocks:
            cast(SparsifinerAttention, block.attn).qkv.weight.mul_(8)  # attention that is worth learning
    teaching = teach(model, x)
    optimiser = torch.optim.Adam(enter_phase(model.train(), "attn_recon"), 1e-2)
    found = []
    for _ in range(25):
        optimiser.zero_grad()
        found.append(losses(model.run(x, trace=True), None, teaching, weights))
        found[-1]["loss"].backward()
        optimiser.step()
    assert found[-1]["attn_recon_loss"] < 0.95 * found[0]["attn_recon_loss"]
    assert found[0]["cls_loss"] == 0


def test_teachers() -> None:
    model, x = micro(), images()
    dense = teach(micro(keep=1.0), x)
    taught = teach(model.train(), x)
    torch.testing.assert_close(taught.logits, dense.logits)
    torch.testing.assert_close(taught.attention, dense.attention)
    assert model.training
    assert not any(part.reconstructing for part in predictors(model))
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=1, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4,
        mlp_ratio=2.0,
    )  # fmt: skip
    state = {key: value for key, value in model.state_dict().items() if ".mask_predictor." not in key}
    vit.load_state_dict(state)
    other = teach(vit, x)
    torch.testing.assert_close(other, dense, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Linear is no timm ViT"):
        teach(nn.Linear(1, 1), x)


def test_losses() -> None:
    model, x, labels = micro(prune_at=(2,)), images(), torch.tensor([1, 2, 3])
    run = model.run(x, trace=True)
    teaching = teach(micro(), x)
    found = losses(run, labels, teaching, LossWeights(ratio=1.0, least=1.0))
    torch.testing.assert_close(found["loss"], sum(v for k, v in found.items() if k != "loss"))
    assert found["ratio_loss"] < 1e-3
    soft = losses(run, nn.functional.one_hot(labels, 10).float(), teaching, LossWeights())
    torch.testing.assert_close(soft["cls_loss"], found["cls_loss"])
    assert not losses(run, None, None, LossWeights(0, 0, 0, 0, 0))["loss"]
    torch.testing.assert_close(basis_l1(model), torch.stack([p.up.abs().mean() for p in predictors(model)]).mean())
    with pytest.raises(ValueError, match="cls needs labels"):
        losses(run, None, teaching, LossWeights())
    with pytest.raises(ValueError, match="need a teacher"):
        losses(run, labels, None, LossWeights())
    with pytest.raises(ValueError, match="unknown distance 'l2'"):
        LossWeights(distance="l2")
    with pytest.raises(ValueError, match="unknown phase"):
        LossWeights().for_phase("third")
    with pytest.raises(ValueError, match="attention of 4 layers for 0 traced ones"):
        losses(model.run(x), labels, teaching, LossWeights())
    with pytest.raises(ValueError, match="do not fit scores"):
        losses(run, labels, Teaching(run.logits, run.tokens, [a[:, :2] for a in teaching.attention]), LossWeights())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"img_size": 9, "patch_size": 2}, "img_size=9 is not a multiple of patch_size=2"),
        ({"keep": (0.5, 0.5)}, "keep has 2 shares for depth=4"),
        ({"token_keep": 0.0}, r"token_keep=0.0 must lie in \(0, 1\]"),
        ({"prune_at": (4,)}, r"prune_at=\(4,\) must name blocks 0..3"),
        ({"prune_at": (1,), "share": 4}, "token pruning needs share=1"),
        ({"stem": "cnn"}, "unknown stem 'cnn'"),
        ({"stem": "conv"}, "patch_size=1 must be even"),
        ({"keep": None}, "give one of them"),
    ],
)
def test_bad_settings(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro(**overrides)
