"""MobileNets with ULSAM: the published counts, torchvision's numbers, and ULSAM put into other libraries' models."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.models import mobilenet_v2

import heed
from heed.layers.ulsam import ULSAM
from heed.models import from_pretrained
from heed.vision.ulsam import ULSAMNet, attention_maps, cost, insert_after, replace_layers


@pytest.mark.parametrize(
    ("name", "parameters", "millions"),
    [
        ("mobilenet_v1", 4_231_976, 568.74),
        ("mobilenet_v1_ulsam", 3_965_748, 516.66),
        ("mobilenet_v2", 3_504_872, 300.77),
        ("mobilenet_v2_ulsam_13_16", 3_067_904, 262.66),
        ("mobilenet_v2_ulsam_12_13_15_16", 2_630_936, 224.54),
        ("mobilenet_v2_ulsam_13", 3_387_092, 278.12),
        ("mobilenet_v2_ulsam_16", 3_185_684, 285.31),
        ("mobilenet_v2_ulsam_12_13_16", 2_950_124, 240.00),
    ],
)
def test_published_counts(name: str, parameters: int, millions: float) -> None:
    with torch.device("meta"):
        model = heed.create_model(name)
    counted = cost(model)
    assert counted.parameters == parameters
    assert counted.multiply_adds / 1e6 == pytest.approx(millions, abs=0.006)


def test_any_of_the_equal_layers_of_v1_may_go() -> None:
    with torch.device("meta"):
        counts = {cost(heed.create_model("mobilenet_v1", replaced=(place,))).parameters for place in range(7, 12)}
    assert counts == {3_965_748}


@pytest.mark.parametrize("width", [0.35, 1.0, 1.4])
@torch.no_grad()
def test_torchvisions_weights_give_torchvisions_logits(width: float) -> None:
    torch.manual_seed(0)
    reference = mobilenet_v2(width_mult=width, num_classes=7).eval()
    model = heed.create_model("mobilenet_v2", width=width, num_classes=7).load_authors(reference.state_dict()).eval()  # type: ignore[attr-defined]
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(model(x), reference(x))


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
@torch.no_grad()
def test_pyramid_at_odd_sizes(name: str) -> None:
    model: Any = heed.create_model(name, width=0.25, num_classes=3).eval()
    features, maps = model.forward_intermediates(torch.randn(1, 3, 70, 45))
    for found, info in zip(maps, model.feature_info, strict=True):
        assert found.shape[1] == info["num_chs"]
        assert found.shape[2:] == (-(-70 // info["reduction"]), -(-45 // info["reduction"]))
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]
    assert features.shape[1] == model.num_features == (1280 if name == "mobilenet_v2" else 256)


def test_after_and_instead() -> None:
    model: Any = heed.create_model("ulsam_micro", replaced=(3,), followed=(2, 5), groups=8, momentum=0.1)
    assert isinstance(model.features[3], ULSAM)
    assert isinstance(model.features[2][1], ULSAM)
    assert isinstance(model.features[5][1], ULSAM)
    assert {m.groups for m in model.modules() if isinstance(m, ULSAM)} == {8}
    assert len(model.idle_parameters()) == 6
    maps = attention_maps(model.eval(), torch.randn(2, 1, 8, 8))
    assert {name: tuple(a.shape) for name, a in maps.items()} == {
        "features.2.1": (2, 8, 8, 8), "features.3": (2, 8, 8, 8), "features.5.1": (2, 8, 4, 4)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("build", "paths", "parameters"),
    [
        (lambda: mobilenet_v2(), ["features.13", "features.16"], 3_067_904),
        (lambda: timm.create_model("mobilenetv2_100"), ["blocks.4.2", "blocks.5.2"], 3_067_904),
        (lambda: timm.create_model("mobilenetv1_100"), ["blocks.3.2"], 3_965_748),
    ],
    ids=["torchvision", "timm v2", "timm v1"],
)
def test_replacing_layers_of_other_libraries(build: Any, paths: list[str], parameters: int) -> None:
    with torch.device("meta"):
        model = build().train()
        swap = replace_layers(model, paths)
        assert swap.after.parameters == parameters
        assert swap.before.multiply_adds > swap.after.multiply_adds
        assert all(isinstance(model.get_submodule(path), ULSAM) for path in paths)
        assert model.training
        if parameters == 3_067_904:
            assert "3,504,872 -> 3,067,904 (-12.5%)" in str(swap)
            assert "(-12.7%)" in str(swap)


@torch.no_grad()
def test_inserting_adds_parameters_and_keeps_the_layer() -> None:
    model = timm.create_model("mobilenetv2_035", num_classes=3).train()
    layer = model.get_submodule("blocks.4.1")
    statistics = model.bn1.running_mean.clone()
    swap = insert_after(model, ["blocks.4.1", "blocks.2.0"], groups=2, image=(3, 32, 32))
    assert swap.after.parameters - swap.before.parameters == (5 * 32 + 6) + (5 * 16 + 6)
    assert model.get_submodule("blocks.4.1.0") is layer
    assert torch.equal(model.bn1.running_mean, statistics)
    assert model.training
    assert set(attention_maps(model.eval(), torch.randn(1, 3, 64, 64))) == {"blocks.4.1.1", "blocks.2.0.1"}


def test_transformers_as_the_host() -> None:
    pytest.importorskip("transformers")
    from transformers import MobileNetV2Config, MobileNetV2Model

    model = MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.25, image_size=64))
    kept = [name for name, layer in model.named_modules() if getattr(layer, "use_residual", False) and "layer" in name]
    swap = replace_layers(model, kept[-1:], groups=2, image=(3, 64, 64))
    assert swap.after.parameters < swap.before.parameters
    assert model.eval()(torch.randn(1, 3, 64, 64)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("paths", "groups", "message"),
    [
        (["features.14"], 4, r"layer 'features.14' turns \(96, 14, 14\) into \(160, 7, 7\)"),
        (["features.7"], 4, "turns"),
        (["features.33"], 4, "unknown layer 'features.33'"),
        ([""], 4, "unknown layer ''"),
        (["classifier"], 4, "gives no map"),
        (["features.12", "features.16"], 64, "channels=96 is not divisible by groups=64"),
    ],
)
def test_what_cannot_be_replaced(paths: list[str], groups: int, message: str) -> None:
    with torch.device("meta"):
        model = mobilenet_v2()
        with pytest.raises(ValueError, match=message):
            replace_layers(model, paths, groups)
    assert not any(isinstance(module, ULSAM) for module in model.modules())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"replaced": (14,)}, "layer 14 turns 96 into 160 channels with stride 2"),
        ({"replaced": (0,)}, "layer 0 is not there"),
        ({"followed": (18,)}, "layers are 1 to 17"),
        ({"version": 3}, "version=3 must be 1 or 2"),
        ({"width": 0.0}, "width=0.0"),
        ({"replaced": (13,), "groups": 7}, "channels=96 is not divisible by groups=7"),
    ],
)
def test_bad_settings(overrides: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        heed.create_model("mobilenet_v2", **overrides)


def test_bad_images() -> None:
    with pytest.raises(ValueError, match=r"images \(B, 1, H, W\)"):
        heed.create_model("ulsam_micro")(torch.zeros(1, 3, 8, 8))


def test_saves_and_loads(tmp_path: Any) -> None:
    model = heed.create_model("ulsam_micro", num_classes=3).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 1, 16, 16)
    again = from_pretrained(tmp_path)
    assert isinstance(again, ULSAMNet)
    assert torch.equal(again(x), model(x))


def test_learns() -> None:
    model = heed.create_model("ulsam_micro", momentum=0.1)
    y = torch.arange(16) % 4
    x = torch.randn(4, 1, 8, 8)[y] + 0.1 * torch.randn(16, 1, 8, 8)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
