"""ConViT: the published counts, timm's network and weights, positions, the analyses, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.convit import ConVit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import heed
from heed.layers.gpsa import GPSA, MHSA
from heed.vision.convit import ConViT, LocalityLog, subsample_classes

GOLDEN = Path(__file__).parents[1] / "golden" / "16-convit" / "convit_tiny_model.safetensors"
# Parameters, multiply-adds (10^9) and what the paper says of the latter.
TABLE = {
    "convit_tiny": (5_710_512, 1.25, 1),
    "convit_tiny_plus": (9_972_912, 2.13, 2),
    "convit_small": (27_777_322, 5.75, 5.4),
    "convit_small_plus": (48_979_882, 10.0, 10),
    "convit_base": (86_540_040, 17.5, 17),
    "convit_base_plus": (153_134_856, 30.7, 30),
}


def micro(**overrides: Any) -> ConViT:
    torch.manual_seed(0)
    return cast(ConViT, heed.create_model("convit_micro", **overrides))


@pytest.mark.parametrize("name", TABLE)
def test_published_counts(name: str) -> None:
    parameters, gmacs, papers = TABLE[name]
    with torch.device("meta"):
        model = cast(ConViT, heed.create_model(name).eval())
        with FlopCounterMode(display=False) as counter:
            assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    counted = counter.get_total_flops() / 2e9
    assert counted == pytest.approx(gmacs, rel=0.01)
    if papers > 2:  # the paper rounds the small ones to whole billions
        assert counted == pytest.approx(papers, rel=0.08)
    assert [type(block.attn) for block in model.blocks] == [GPSA] * 10 + [MHSA] * 2


@pytest.mark.parametrize("name", ["convit_tiny", "convit_small", "convit_base"])
def test_timms_parameters_by_name(name: str) -> None:
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), heed.create_model(name)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes


@torch.no_grad()
def test_timms_checkpoints_give_timms_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = ConVit(
        img_size=20, patch_size=4, num_classes=5, embed_dim=4, num_heads=4, depth=3, local_up_to_layer=2,
        norm_layer=lambda dim, **_: nn.LayerNorm(dim, eps=1e-6),  # type: ignore[arg-type]
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    settings = {"img_size": 20, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 3, "local_up_to_layer": 2}
    ours = ConViT.from_authors(tmp_path / "model.safetensors", "convit_tiny", **settings)
    x = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    maps = ours.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(maps, theirs.forward_intermediates(x, intermediates_only=True), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_loads_the_authors_checkpoint(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN)
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    torch.save({"model": state, "epoch": 299}, tmp_path / "convit.pth")
    settings = {"img_size": 20, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 4, "local_up_to_layer": 3,
                "mlp_ratio": 2.0}  # fmt: skip
    model = ConViT.from_authors(tmp_path / "convit.pth", "convit_tiny", **settings)
    torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits"], rtol=1e-4, atol=5e-5)
    with pytest.raises(ValueError, match="does not fit ConViT"):
        ConViT.from_authors(tmp_path / "convit.pth", "convit_tiny", **settings | {"dim": 32})


def test_starts_local() -> None:
    model = micro()
    for layer in model.gpsa_layers():
        assert torch.equal(layer.v.weight, torch.eye(64))
        assert torch.equal(layer.pos_proj.weight[0], torch.tensor([-1.0, -1.0, -1.0]))
    torch.testing.assert_close(model.gates(), torch.full((3, 4), 0.7310586))
    assert not torch.equal(micro(local_init=False).gpsa_layers()[0].v.weight, torch.eye(64))


@torch.no_grad()
def test_class_token_joins_late() -> None:
    model = micro(local_up_to_layer=2).eval()
    x = torch.randn(2, 1, 8, 8)
    outputs = model.block_outputs(x)
    assert [tokens.shape[1] for tokens in outputs] == [16, 16, 17, 17]
    assert [weights.shape[-1] for weights in model.attention_maps(x)] == [16, 16, 17, 17]
    torch.testing.assert_close(model(x), model.head(model.norm(outputs[-1][:, 0])))
    plain = micro(local_up_to_layer=0).eval()
    assert plain.gpsa_layers() == []
    assert plain.gates().shape == (0, 4)
    assert plain(x).shape == (2, 10)


@torch.no_grad()
def test_analyses() -> None:
    model = micro().train()
    x = torch.randn(3, 1, 8, 8)
    for weights in model.attention_maps(x):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    found = model.nonlocality(x)
    assert found.shape == (4, 4)
    assert (found[:3] < found[3]).all()  # uniform content, so that only GPSA's positions are local
    log = LocalityLog(model, x)
    log(0)
    nn.init.constant_(model.gpsa_layers()[1].gating_param, -9.0)
    log("later")
    assert model.training
    assert log.steps == [0, "later"]
    assert (log.gates[1][1] < 1e-3).all()
    assert (log.nonlocality[1][1] > log.nonlocality[0][1]).all()


@pytest.mark.parametrize(
    ("options", "part"),
    [({}, None), ({"mode": "position"}, "qk.weight"), ({"mode": "content"}, "pos_proj.weight"),
     ({"freeze_gates": True}, "gating_param"), ({"freeze_positions": True}, "pos_proj.weight")],
)  # fmt: skip
def test_idle_parameters(options: dict[str, Any], part: str | None) -> None:
    model = micro(**options)
    model(torch.randn(2, 1, 8, 8)).square().sum().backward()
    idle = set(model.idle_parameters())
    for name, parameter in model.named_parameters():
        silent = parameter.grad is None or parameter.grad.abs().max() < 1e-5
        assert not silent or name in idle
    assert (part is None) or all(f"blocks.{i}.attn.{part}" in idle for i in range(3))


@torch.no_grad()
def test_positions_are_interpolated_on_request() -> None:
    model = micro().eval()
    with pytest.raises(ValueError, match=r"images of 12 x 12 .* interpolate the positions with set_image_size\(\)"):
        model(torch.randn(1, 1, 12, 12))
    model.set_image_size(12)
    assert model.config.img_size == 12
    assert model(torch.randn(1, 1, 12, 12)).shape == (1, 10)
    constant = micro()
    nn.init.ones_(cast(nn.Parameter, constant.pos_embed))
    constant.set_image_size(6)
    torch.testing.assert_close(cast(nn.Parameter, constant.pos_embed).detach(), torch.ones(1, 9, 64))


@torch.no_grad()
def test_without_positions_images_have_any_sides() -> None:
    model = micro(pos_embed=False, patch_size=2).eval()
    final, maps = model.forward_intermediates(torch.randn(2, 1, 6, 10))
    assert final.shape == (2, 64, 1, 1)
    assert [tuple(m.shape) for m in maps] == [(2, 64, 3, 5)] * 4
    model.set_image_size(16)
    assert model.config.img_size == 16


def test_subsampling_keeps_the_same_share_of_every_class() -> None:
    labels = [1, 0, 1, 1, 0, 1, 0]
    assert subsample_classes(labels, 0.5) == [1, 0, 2]
    assert subsample_classes(labels, 0.5, list("gfedcba")) == [6, 5, 3]
    assert sorted(subsample_classes(labels, 1.0)) == list(range(7))
    with pytest.raises(ValueError, match=r"ratio=0 must lie in \(0, 1\]"):
        subsample_classes(labels, 0)
    with pytest.raises(ValueError, match="1 names for 7 labels"):
        subsample_classes(labels, 0.5, ["a"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"img_size": 9, "patch_size": 2}, "img_size=9 is not a multiple of patch_size=2"),
        (
            {"local_up_to_layer": 5},
            "local_up_to_layer=5 with depth=4 leaves no block for the class token; 3 is the most",
        ),
        ({"local_up_to_layer": 4}, "local_up_to_layer=4"),
        ({"num_heads": 5}, "dim=64 is not divisible by num_heads=5"),
        ({"mode": "both"}, "unknown mode 'both'"),
    ],
)
def test_bad_settings(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro(**overrides)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 8), r"images \(B, 1, H, W\)"),
        ((1, 3, 8, 8), r"images \(B, 1, H, W\)"),
        ((1, 1, 8, 10), "images of 8 x 10 pixels given"),
    ],
)
def test_bad_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro()(torch.zeros(shape))
    with pytest.raises(ValueError, match="hold no whole patches of 4"):
        micro(pos_embed=False, patch_size=4)(torch.zeros(1, 1, 8, 10))
