"""NAT, DiNAT, DiNAT_s and the isotropic models: published counts, dilations, padding, checkpoints, receptive fields."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import heed
from heed.layers.neighborhood import NeighborhoodAttention2D
from heed.models import create_model
from heed.vision.dinats import DiNATs
from heed.vision.nat import NAT, NATConfig, NATLayer, dilation_cost
from heed.vision.nat_dilations import DENSE_DILATIONS, alternating_dilations, receptive_field
from heed.vision.nat_isotropic import NATIsotropic, RPBAttention, ViTRPB
from heed.vision.nat_weights import from_transformers, resize_windows

EXACT = {"rtol": 1e-4, "atol": 2e-5}
GOLDEN = Path(__file__).parents[1] / "golden" / "58-dinat"
few = settings(max_examples=12, deadline=None)

# Parameters and multiply-adds (10^9).
COUNTS = {
    "nat_mini": (19_984_174, 2.69),
    "nat_tiny": (27_901_582, 4.30),
    "nat_small": (50_743_297, 7.77),
    "nat_base": (89_769_652, 13.68),
    "dinat_mini": (19_984_174, 2.69),
    "dinat_tiny": (27_901_582, 4.30),
    "dinat_small": (50_719_681, 7.77),
    "dinat_base": (89_769_652, 13.68),
    "dinat_large": (200_943_514, 30.6),
    "dinat_large_384": (200_943_514, 89.7),
    "dinat_large_384_11x11": (201_144_250, 92.4),
    "dinat_s_tiny": (28_288_354, 4.49),
    "dinat_s_small": (49_606_258, 8.74),
    "dinat_s_base": (87_768_224, 15.43),
    "dinat_s_large": (196_532_476, 34.5),
    "dinat_s_large_384": (196_532_476, 101.3),
    "nat_isotropic_small": (21_999_736, 4.3),
    "nat_isotropic_base": (86_465_800, 16.9),
    "dinat_isotropic_small": (21_999_736, 4.3),
    "dinat_isotropic_base": (86_465_800, 16.9),
    "vitrpb_small": (22_080_376, 4.6),
    "vitrpb_base": (86_627_080, 17.5),
}


def tiny(cls: type[NAT] = NAT, seed: int = 0, **overrides: Any) -> NAT:
    torch.manual_seed(seed)
    base = NATConfig(num_classes=5, dim=8, depths=(2, 1), num_heads=(2, 4), kernel_size=3, mlp_ratio=2.0, drop_path=0.0)
    model = cls(replace(base, **overrides)).eval()
    for name, parameter in model.named_parameters():
        if ".attn." in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)  # so that one that were forgotten would show
    return model


def attention(**options: Any) -> NeighborhoodAttention2D:
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(8, 2, **{"kernel_size": 3, "rel_pos_bias": True, "pad": True} | options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name: str) -> None:
    """The class counts heads and convolutions too; the published figures round, at 384 pixels by a third of a percent."""
    with torch.device("meta"):
        model: Any = create_model(name)
    parameters, multiply_adds = COUNTS[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.flops() / 1e9 == pytest.approx(multiply_adds, rel=0.01)


@pytest.mark.parametrize(
    ("name", "wide"),
    [
        ("dinat_tiny", [8, 4, 2, 1]),
        ("dinat_large_384", [13, 6, 3, 1]),
        ("dinat_large_384_11x11", [8, 4, 2, 1]),
        ("dinat_s_base", [8, 4, 2, 1]),
        ("dinat_s_large_384", [13, 6, 3, 1]),
        ("nat_tiny", [1, 1, 1, 1]),
    ],
)
def test_published_dilations(name: str, wide: list[int]) -> None:
    config = heed.models.models.get(name).config
    expected = tuple(tuple((1, w)[i % 2] for i in range(n)) for w, n in zip(wide, config.depths, strict=True))
    assert config.schedule == expected
    with torch.device("meta"):
        model = create_model(name)
    found = tuple(tuple(block.attn.dilation[0] for block in level.blocks) for level in model.levels)  # type: ignore[union-attr]
    assert found == expected


def test_dense_dilations_fit_the_published_depths() -> None:
    for dilations in DENSE_DILATIONS.values():
        assert tuple(map(len, dilations)) == (3, 4, 18, 5)
        assert all(row[0] == 1 for row in dilations)
    assert DENSE_DILATIONS["coco"][2] == (1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7)


def test_layer_scale_exists_in_some_sizes_only() -> None:
    for name, has in (("nat_small", True), ("dinat_small", False), ("dinat_base", True), ("dinat_large", False)):
        with torch.device("meta"):
            model = create_model(name)
        assert any(key.endswith("gamma1") for key, _ in model.named_parameters()) is has
    assert torch.equal(NATLayer(attention(), layer_scale=1e-5).gamma2, torch.full((8,), 1e-5))  # type: ignore[arg-type]


def test_flops_are_those_that_torch_counts() -> None:
    """Windows as large as the map: dense attention, which torch can count, plus what only heads and stems add."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny(depths=(2, 2), kernel_size=5, dilations=None)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 20, 20))  # maps of 5 x 5 and 3 x 3; the latter is padded to 5 x 5
    assert model.flops(20, 20) == counter.get_total_flops() / 2


@few
@given(st.integers(3, 12), st.integers(3, 12), st.integers(1, 4), st.sampled_from([3, 5]))
def test_padding_is_zeros_below_and_right_and_a_crop(height: int, width: int, dilation: int, kernel: int) -> None:
    module = attention(dilation=dilation, kernel_size=kernel)
    x = torch.randn(2, height, width, 8)
    below, right = (max(0, kernel * dilation - side) for side in (height, width))
    by_hand = replace_pad(module, F.pad(x, (0, 0, 0, right, 0, below)))[:, :height, :width]
    torch.testing.assert_close(module(x), by_hand, **EXACT)
    assert module.padded((height, width)) == (height + below, width + right)


def replace_pad(module: NeighborhoodAttention2D, x: Tensor) -> Tensor:
    """The module without its padding: it raises where a window does not fit."""
    module.pad = False
    try:
        return module(x)
    finally:
        module.pad = True


def test_padded_tokens_take_part_as_keys() -> None:
    module = attention(dilation=3)
    nn.init.zeros_(module.qkv.weight)  # all keys are alike, so the output is the mean of values, plus nothing else
    nn.init.zeros_(module.rpb)  # type: ignore[arg-type]
    x = torch.randn(1, 4, 4, 8)
    torch.testing.assert_close(module(x), module.proj(module.qkv.bias[16:]).expand(x.shape), **EXACT)


def test_without_padding_a_small_map_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds the 8 tokens of axis 0"):
        attention(dilation=3, pad=False)(torch.randn(1, 8, 9, 8))


@few
@given(st.integers(3, 8), st.integers(3, 8), st.integers(1, 3))
def test_equals_its_definition(height: int, width: int, dilation: int) -> None:
    """Window by window, with the table's index and the scale on q alone written out."""
    module = attention(dilation=dilation)
    height, width = max(height, 3 * dilation), max(width, 3 * dilation)
    x = torch.randn(1, height, width, 8)
    q, k, v = module.qkv(x)[0].unflatten(-1, (3, 2, 4)).unbind(2)
    y = torch.zeros(height, width, 2, 4)
    for i in range(height):
        for j in range(width):
            rows, columns = near(i, height, dilation), near(j, width, dilation)
            keys, values = k[rows][:, columns], v[rows][:, columns]
            table = module.rpb[:, [(a - i) // dilation + 2 for a in rows]]  # type: ignore[index]
            table = table[:, :, [(b - j) // dilation + 2 for b in columns]]
            logits = torch.einsum("hc,abhc->hab", q[i, j] * 4**-0.5, keys) + table
            weights = logits.flatten(1).softmax(1).view_as(logits)
            y[i, j] = torch.einsum("hab,abhc->hc", weights, values)
    torch.testing.assert_close(module(x)[0], module.proj(y.flatten(2)), **EXACT)


def near(i: int, side: int, dilation: int) -> list[int]:
    """The three tokens of i's dilation group that are nearest to it."""
    group = list(range(i % dilation, side, dilation))
    at = min(max(group.index(i), 1), len(group) - 2)
    return group[at - 1 : at + 2]


def test_a_window_of_the_whole_map_is_global_attention_with_relative_bias() -> None:
    module = attention(kernel_size=5)
    whole = RPBAttention(8, 2, 5)
    whole.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 5, 8)
    torch.testing.assert_close(module(x), whole(x), **EXACT)


def test_a_table_that_is_constant_per_head_changes_nothing() -> None:
    module = attention(dilation=2)
    x = torch.randn(1, 7, 8, 8)
    nn.init.zeros_(module.rpb)  # type: ignore[arg-type]
    before = module(x)
    module.rpb.data += torch.tensor([3.0, -2.0]).view(2, 1, 1)  # type: ignore[union-attr]
    torch.testing.assert_close(module(x), before, **EXACT)


@few
@given(st.integers(1, 3), st.integers(-1, 1), st.integers(-1, 1))
def test_shifts_by_the_dilation_move_the_inside(dilation: int, down: int, right: int) -> None:
    module = attention(dilation=dilation)
    side, reach = 9 * dilation, 2 * dilation
    x = torch.randn(1, side, side, 8)
    steps = dilation * down, dilation * right
    moved = module(x.roll(steps, (1, 2)))
    inside = slice(reach, side - reach)
    torch.testing.assert_close(moved[:, inside, inside], module(x).roll(steps, (1, 2))[:, inside, inside], **EXACT)


def test_dinat_is_nat_with_dilations() -> None:
    plain, dilated = tiny(), tiny(seed=1, dilations=((1, 3), (2,)))
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 52, 44)
    assert not torch.allclose(dilated(x), plain(x), atol=1e-3)
    torch.testing.assert_close(tiny(dilations=((1, 1), (1,)))(x), plain(x))
    assert dilation_cost(dilated, 52, 44) == 1  # maps of 13 x 11 and 7 x 6
    assert torch.equal(dilated.set_dilations(None)(x), plain(x))
    assert dilated.config.dilations is None


@pytest.mark.parametrize("cls", [NAT, DiNATs])
def test_dilation_costs_nothing_until_maps_are_padded(cls: type[NAT]) -> None:
    model = tiny(cls, dilations=((1, 3), (2,)))
    assert dilation_cost(model) == 1
    assert dilation_cost(model, 32, 32) > 1  # maps of 8 x 8 hold no window of 9
    with torch.device("meta"):
        published = create_model("dinat_tiny")
    assert isinstance(published, NAT)
    assert dilation_cost(published) == 1
    assert dilation_cost(published.set_dilations(DENSE_DILATIONS["coco"])) > 2
    assert dilation_cost(published, 800, 1280) == pytest.approx(1, abs=0.05)


def test_set_dilations_for_larger_images() -> None:
    model = tiny(depths=(2, 2), dilations="alternating", img_size=48)
    assert model.config.schedule == ((1, 4), (1, 2))
    model.set_dilations(alternating_dilations(96, 3, (2, 2)))
    assert [[block.attn.dilation for block in level.blocks] for level in model.levels] == [  # type: ignore[union-attr]
        [(1, 1), (8, 8)],
        [(1, 1), (4, 4)],
    ]
    fresh = tiny(seed=3, depths=(2, 2), dilations="alternating", img_size=96)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(fresh(x), model(x))


@few
@given(st.integers(2, 4), st.booleans())
def test_receptive_field_grows_as_claimed(layers: int, dilated: bool) -> None:
    dilations = [3**i if dilated else 1 for i in range(layers)]
    side = 3**5
    seen = receptive_field(side, 3, dilations).sum(1)
    assert seen[side // 2] == (3**layers if dilated else 1 + 2 * layers)
    if not dilated:
        assert seen.min() >= 1 + layers  # in the corner


@few
@given(st.integers(4, 11), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_receptive_field_is_what_gradients_show(side: int, dilations: list[int]) -> None:
    x = torch.randn(1, side, side, 2, dtype=torch.float64, requires_grad=True)
    y = x
    for dilation in dilations:
        y = NeighborhoodAttention2D(2, 1, 3, dilation=dilation, pad=True).double()(y)
    reach = receptive_field(side, 3, dilations)
    (gradient,) = torch.autograd.grad(y[0, 1, side - 2].sum(), x)
    assert torch.equal(gradient[0].abs().sum(-1) > 0, reach[1][:, None] & reach[side - 2])


@pytest.mark.parametrize("cls", [NAT, DiNATs])
@pytest.mark.parametrize("stage_norms", [False, True])
@pytest.mark.parametrize("size", [(33, 50), (64, 41), (5, 9)])
def test_any_image_size_gives_a_pyramid(cls: type[NAT], stage_norms: bool, size: tuple[int, int]) -> None:
    model = tiny(cls, depths=(1, 2, 1), num_heads=(2, 2, 2), dilations="alternating", stage_norms=stage_norms)
    x = torch.randn(2, 3, *size)
    final, maps = model.forward_intermediates(x)
    for i, (feature, info) in enumerate(zip(maps, model.feature_info, strict=True)):
        assert feature.shape == (2, 8 * 2**i, *(-(-side // (4 * 2**i)) for side in size))
        assert (info["num_chs"], info["reduction"]) == (8 * 2**i, 4 * 2**i)
        model.get_submodule(info["module"])
        if stage_norms:
            norm = model.norms[i]
            back = (feature.permute(0, 2, 3, 1) - norm.bias) / norm.weight  # type: ignore[operator]
            torch.testing.assert_close(back.mean(-1), torch.zeros(back.shape[:-1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.forward_head(final), model(x))


def test_merging_takes_row_parity_first_and_pads_odd_sides() -> None:
    merge = DiNATs.downsampler(2)
    nn.init.eye_(merge.reduction.weight)
    merge.norm = nn.Identity()
    x = torch.randn(1, 3, 4, 2)
    padded = F.pad(x, (0, 0, 0, 0, 0, 1))
    expected = torch.cat([padded[:, 0::2, 0::2], padded[:, 1::2, 0::2]], -1)  # the first 4 of 8 channels
    torch.testing.assert_close(merge(x), expected)


def test_isotropic_models_alternate_dilations() -> None:
    model = create_model("dinat_isotropic_micro")
    assert [layer.attn.dilation[0] for layer in model.layers] == [1, 2, 1, 2]  # type: ignore[union-attr]
    with torch.device("meta"):
        dilations = [layer.attn.dilation[0] for layer in create_model("dinat_isotropic_small").layers]  # type: ignore[union-attr]
    assert dilations == [1, 2] * 6


def test_isotropic_nat_with_windows_of_the_whole_map_is_vit_rpb() -> None:
    nat = create_model("nat_isotropic_micro", kernel_size=5, img_size=20, patch_size=4, depth=2).eval()
    vit = create_model("vitrpb_micro", img_size=20, num_heads=8, depth=2).eval()
    vit.load_state_dict(nat.state_dict())
    x = torch.randn(2, 1, 20, 20)
    torch.testing.assert_close(nat(x), vit(x), **EXACT)


def test_stochastic_depth_rises_over_all_layers() -> None:
    model = tiny(depths=(2, 3), drop_path=0.4)
    rates = [block.drop_path.drop_prob for level in model.levels for block in level.blocks]  # type: ignore[union-attr]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_dropout_is_for_training() -> None:
    model = tiny(drop=0.3, attn_drop=0.3)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), tiny()(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_tables_do_not_decay() -> None:
    model = tiny()
    assert model.no_weight_decay() == {f"levels.{i}.blocks.{j}.attn.rpb" for i, j in ((0, 0), (0, 1), (1, 0))}
    groups = create_optimizer_v2(model, "adamw", weight_decay=0.05).param_groups
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    named = dict(model.named_parameters())
    assert all(id(named[name]) not in decaying for name in model.no_weight_decay())
    assert id(named["head.weight"]) in decaying


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}, tensors


NAT_GOLDEN: dict[str, Any] = {
    "num_classes": 4, "dim": 12, "depths": (1, 1), "num_heads": (3, 3), "kernel_size": 5, "mlp_ratio": 3.0
}  # fmt: skip


def test_converts_the_authors_classifier(tmp_path: Path) -> None:
    state, tensors = golden("nat_tiny_model")
    torch.save({"state_dict": state, "epoch": 299}, tmp_path / "nat.pth")
    model = NAT.from_authors(tmp_path / "nat.pth", "nat_mini", **NAT_GOLDEN)
    assert not model.training
    torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits"], rtol=1e-4, atol=5e-5)


def test_converts_the_authors_dinat_s_and_isotropic_checkpoints(tmp_path: Path) -> None:
    for name, cls, heeds, options in (
        ("dinat_s_tiny_model", DiNATs, "dinat_s_tiny", {"dim": 8, "depths": (2, 1), "num_heads": (2, 4), "num_classes": 5,
                                                        "kernel_size": 3, "dilations": ((1, 3), (1,)), "mlp_ratio": 2.0}),
        ("vit_rpb_model", ViTRPB, "vitrpb_small", {"img_size": 24, "patch_size": 6, "num_classes": 4, "dim": 12,
                                                   "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}),
    ):  # fmt: skip
        state, tensors = golden(name)
        save_file(state, tmp_path / f"{name}.safetensors")
        model = cls.from_authors(tmp_path / f"{name}.safetensors", heeds, **options)
        torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits"], rtol=1e-4, atol=5e-5)


def test_converts_the_authors_detector(tmp_path: Path) -> None:
    """mmdet's layout: the backbone under a prefix with a norm per level, and the detector's own parts beside it."""
    state, tensors = golden("nat_tiny_model")
    backbone = {k: v for k, v in state.items() if not k.startswith(("norm.", "head."))}
    for i, dim in enumerate((12, 24)):
        backbone |= {f"norm{i}.weight": torch.full((dim,), 2.0), f"norm{i}.bias": torch.ones(dim)}
    detector = {f"backbone.{k}": v for k, v in backbone.items()} | {"neck.fpn.weight": torch.ones(1)}
    torch.save({"state_dict": detector, "meta": {}}, tmp_path / "cascade.pth")
    options = NAT_GOLDEN | {"num_classes": 0, "stage_norms": True}
    model = NAT.from_authors(tmp_path / "cascade.pth", "nat_mini", **options)
    maps = model.forward_intermediates(tensors["input.x"], intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(12, 10, 10), (24, 5, 5)]
    torch.testing.assert_close(maps[0].mean(1), torch.ones(1, 10, 10), rtol=0, atol=1e-5)
    # A classifier's checkpoint starts a pyramid too, with norms as they are when new.
    torch.save(state, tmp_path / "nat.pth")
    started = NAT.from_authors(tmp_path / "nat.pth", "nat_mini", **options)
    first = started.forward_intermediates(tensors["input.x"], intermediates_only=True)[0]
    torch.testing.assert_close(2 * first + 1, maps[0], **EXACT)


def test_converts_transformers_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against transformers' own classes, with the axes of their attention in the order that its operators expect."""
    from transformers import DinatConfig
    from transformers.models.dinat import modeling_dinat

    monkeypatch.setattr(modeling_dinat, "requires_backends", lambda *_: None)
    monkeypatch.setattr(modeling_dinat.NeighborhoodAttention, "forward", their_attention)
    torch.manual_seed(0)
    settings = DinatConfig(
        embed_dim=8, depths=[2, 1], num_heads=[2, 4], kernel_size=3, dilations=[[1, 3], [1]], mlp_ratio=2.0,
        layer_scale_init_value=0.5, num_labels=5, out_features=["stage1", "stage2"],
    )  # fmt: skip
    theirs = modeling_dinat.DinatForImageClassification(settings).eval()
    pyramid = modeling_dinat.DinatBackbone(settings).eval()
    for parameter in (*theirs.parameters(), *pyramid.parameters()):
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 41, 38)
    options: dict[str, Any] = {
        "num_classes": 5, "dim": 8, "depths": (2, 1), "num_heads": (2, 4), "kernel_size": 3, "mlp_ratio": 2.0,
        "dilations": ((1, 3), (1,)), "layer_scale": 1e-5,
    }  # fmt: skip
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    model = NAT.from_authors(tmp_path / "model.safetensors", "dinat_base", **options)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x).logits, rtol=1e-3, atol=1e-3)
        options |= {"stage_norms": True, "num_classes": 0}
        maps = create_model("dinat_base", **options).load_authors(pyramid.state_dict()).eval().stage_maps(x)  # type: ignore[operator]
        for found, wanted in zip(maps, pyramid(x).feature_maps, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        started = create_model("dinat_base", **options).load_authors(theirs.state_dict()).eval()  # type: ignore[operator]
        tokens = model.norm(model.stage_maps(x)[-1].permute(0, 2, 3, 1))
        normed = model.norm(started.stage_maps(x)[-1].permute(0, 2, 3, 1))  # new norms change the scale alone
        torch.testing.assert_close(normed, tokens, rtol=1e-3, atol=1e-3)
    assert "norm.weight" in from_transformers(theirs.state_dict())


def their_attention(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
    """transformers' NeighborhoodAttention written out: heads before rows, a mask for the windows."""
    from heed.layers.natten import natten2dav, natten2dqkrpb

    heads, width = self.num_attention_heads, self.attention_head_size
    q, k, v = (
        part(hidden_states).unflatten(-1, (heads, width)).permute(0, 3, 1, 2, 4)
        for part in (self.query, self.key, self.value)
    )
    scores = natten2dqkrpb(q / width**0.5, k, self.rpb, self.kernel_size, self.dilation)
    return (natten2dav(scores.softmax(-1), v, self.kernel_size, self.dilation).permute(0, 2, 3, 1, 4).flatten(3),)


def test_another_window_needs_interpolated_tables() -> None:
    small = tiny()
    state = small.state_dict()
    with pytest.raises(ValueError, match=re.escape("is for windows of 3, the model has windows of 5: load")):
        tiny(kernel_size=5).load_authors(state)
    large = tiny(kernel_size=5).load_authors(resize_windows(state, 5))
    old, new = (model.levels[0].blocks[0].attn.rpb for model in (small, large))  # type: ignore[union-attr]
    assert new.shape == (2, 9, 9)
    torch.testing.assert_close(new[:, 4, 4], old[:, 2, 2])  # offset 0 stays in the middle
    assert torch.equal(large.state_dict()["head.weight"], state["head.weight"])
    flat = resize_windows({"attn.rpb": torch.full((2, 25, 25), 0.7)}, 11)["attn.rpb"]
    torch.testing.assert_close(flat, torch.full((2, 21, 21), 0.7))


def test_saves_and_loads(tmp_path: Path) -> None:
    for model in (tiny(dilations=((1, 2), (1,))), tiny(DiNATs)):
        model.save_pretrained(tmp_path)
        x = torch.randn(1, 3, 40, 40)
        again = heed.from_pretrained(tmp_path)
        assert again.config == model.config
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("side", [8, 13, 28, 32])
@pytest.mark.parametrize("name", ["nat_micro", "dinat_micro", "dinat_s_micro", "dinat_isotropic_micro"])
@torch.no_grad()
def test_micro_takes_small_images(name: str, side: int) -> None:
    assert create_model(name, img_size=side).eval()(torch.randn(2, 1, side, side)).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "odd windows"),
        ({"kernel_size": 1}, "1 must be an integer >= 2"),
        ({"dilations": ((1, 0), (1,))}, "0 must be an integer >= 1"),
        ({"dilations": ((1, 2), (1, 2))}, r"has \(2, 2\) entries; depths=\(2, 1\) needs one per layer"),
        ({"dilations": ((1, 2),)}, "needs one per layer"),
        ({"dilations": "gradual"}, "must be 'alternating'"),
        ({"num_heads": (2,)}, "one entry per level"),
        ({"num_heads": (3, 3)}, "dim=8 is not divisible by num_heads=3"),
        ({"stem_stride": 8}, "stem_stride=8 must be 1, 2 or 4"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_bad_dilations_leave_the_model_alone() -> None:
    model = tiny(dilations=((1, 2), (1,)))
    for dilations in (((1, 2), (0,)), ((1,), (1,)), "gradual"):
        with pytest.raises(ValueError, match="dilation"):
            model.set_dilations(dilations)  # type: ignore[arg-type]
    assert model.config.schedule == ((1, 2), (1,))
    assert model.levels[0].blocks[1].attn.dilation == (2, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    for model in (tiny(), create_model("dinat_isotropic_micro", in_chans=3)):
        with pytest.raises(ValueError, match=r"images \(B, 3, H, W\)"):
            model(torch.zeros(shape))


def test_channels_come_last() -> None:
    with pytest.raises(ValueError, match=r"has 8 channels, the input \(1, 8, 6, 6\) has 6; channels come last"):
        NATLayer(attention())(torch.zeros(1, 8, 6, 6))


def test_bad_checkpoints_and_windows(tmp_path: Path) -> None:
    state, _ = golden("nat_tiny_model")
    torch.save(state, tmp_path / "nat.pth")
    with pytest.raises(ValueError, match=r"head.weight \(4, 24\) for \(7, 24\)"):
        NAT.from_authors(tmp_path / "nat.pth", "nat_mini", **NAT_GOLDEN | {"num_classes": 7})
    with pytest.raises(ValueError, match="is a NATIsotropic, not a NAT"):
        NAT.from_authors(tmp_path / "nat.pth", "dinat_isotropic_micro")
    with pytest.raises(ValueError, match="kernel_size=4 must be an odd integer"):
        resize_windows(state, 4)
    with pytest.raises(ValueError, match="no tables"):
        resize_windows({"head.weight": torch.zeros(1)}, 7)
    with pytest.raises(ValueError, match="img_size=20 is not a multiple of patch_size=16"):
        create_model("vitrpb_small", img_size=20)
    assert isinstance(create_model("nat_isotropic_micro", img_size=9), NATIsotropic)
