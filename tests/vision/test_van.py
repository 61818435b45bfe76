"""VAN: the published counts, its blocks, any image size, the ablations, and the authors' checkpoints."""

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
from torch.utils.flop_counter import FlopCounterMode

import heed
from heed.layers.lka import LKA, VANAttention
from heed.vision.van import VAN, VANBlock, VANConfig, van_recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "25-van" / "model_tiny.safetensors"
GOLDEN_CONFIG: dict[str, Any] = {
    "num_classes": 10, "dims": (8, 12, 16, 20), "mlp_ratios": (8, 8, 4, 4), "depths": (1, 1, 2, 1)
}  # fmt: skip
TABLE = {
    "van_b0": (4_105_800, 0.864, 2.539),
    "van_b1": (13_861_800, 2.495, 7.332),
    "van_b2": (26_578_472, 4.993, 14.672),
    "van_b3": (44_765_608, 8.925, 26.228),
    "van_b4": (60_283_176, 12.144, 35.687),
    "van_b5": (89_967_688, 17.129, 50.337),
    "van_b6": (199_829_416, 38.710, 113.759),
}


def tiny(**overrides: Any) -> VAN:
    return cast(VAN, heed.create_model("van_b0", **GOLDEN_CONFIG | {"drop_path": 0.0} | overrides))


def gmacs(model: nn.Module, side: int) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", TABLE)
def test_published_counts(name: str) -> None:
    with torch.device("meta"):
        model = heed.create_model(name).eval()
    parameters, small, large = TABLE[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert gmacs(model, 224) == pytest.approx(small, abs=6e-4)
    if name in ("van_b0", "van_b2"):
        assert gmacs(model, 384) == pytest.approx(large, abs=6e-4)
        assert gmacs(model, 384) / gmacs(model, 224) == pytest.approx((384 / 224) ** 2, rel=1e-3)  # linear in pixels


def test_blocks_start_near_and_scaled_to_zero_are_the_identity() -> None:
    block = VANBlock(VANAttention(6)).eval()
    x = torch.randn(2, 6, 7, 5)
    assert 0 < (block(x) - x).abs().max() < 0.5
    nn.init.zeros_(block.ls1.gamma)
    nn.init.zeros_(block.ls2.gamma)
    assert torch.equal(block(x), x)


def test_stochastic_depth_rises_over_the_whole_network() -> None:
    model = tiny(drop_path=0.4)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]  # type: ignore[union-attr]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@torch.no_grad()
def test_initial_weights() -> None:
    model = cast(VAN, heed.create_model("van_b0", depths=(1, 1, 1, 1)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.06)
            assert not cast(Tensor, module.bias).any()
    head = cast(nn.Linear, model.head)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    small = heed.create_model("van_b0", depths=(1, 1, 1, 1), head_init_scale=0.001).head
    assert small.weight.std().item() == pytest.approx(2e-5, rel=0.02)  # type: ignore[union-attr]


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90))
@torch.no_grad()
def test_any_image_size_gives_a_normalised_pyramid(height: int, width: int) -> None:
    model = tiny(norm_eps=1e-5).eval()
    final, maps = model.forward_intermediates(torch.randn(2, 3, height, width))
    for stage, info in zip(maps, model.feature_info, strict=True):
        step = info["reduction"]
        assert stage.shape == (2, info["num_chs"], -(-height // step), -(-width // step))
        torch.testing.assert_close(stage.mean(1), torch.zeros_like(stage[:, 0]), rtol=0, atol=1e-5)
    assert torch.equal(final, maps[-1])
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]


@torch.no_grad()
def test_the_last_map_is_averaged() -> None:
    model = tiny().eval()
    x = torch.randn(2, 3, 50, 70)
    pooled = model.forward_features(x).mean((2, 3))
    torch.testing.assert_close(model(x), model.head(pooled))


@pytest.mark.parametrize("combine", ["add", "none", "sigmoid"])
def test_ablations(combine: str) -> None:
    model = tiny(combine=combine, omit=("conv1",)).eval()
    gates = [module for module in model.modules() if isinstance(module, LKA)]
    assert len(gates) == 5
    assert all(gate.combine == combine and isinstance(gate.conv1, nn.Identity) for gate in gates)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def golden_state() -> dict[str, Tensor]:
    return {k.removeprefix("state."): v for k, v in load_file(GOLDEN).items() if k.startswith("state.")}


@torch.no_grad()
def test_loads_the_authors_classifier(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN)
    torch.save({"state_dict": golden_state(), "epoch": 309}, tmp_path / "van.pth.tar")
    model = VAN.from_authors(tmp_path / "van.pth.tar", "van_b0", **GOLDEN_CONFIG)
    assert not model.training
    torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits"], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_loads_the_authors_segmentation_backbone(tmp_path: Path) -> None:
    """mmseg's layout: the backbone under a prefix, its own head beside it, no classifier."""
    state = {f"backbone.{k}": v for k, v in golden_state().items() if not k.startswith("head.")}
    torch.save({"state_dict": state | {"decode_head.conv_seg.bias": torch.ones(3)}}, tmp_path / "fpn.pth")
    settings = GOLDEN_CONFIG | {"num_classes": 0, "norm_eps": 1e-5}
    model = VAN.from_authors(tmp_path / "fpn.pth", "van_b0", **settings)
    tensors = load_file(GOLDEN)
    maps = model.forward_intermediates(tensors["input.x"], intermediates_only=True)
    for i, stage in enumerate(maps):  # the case was made with eps 1e-6
        torch.testing.assert_close(stage, tensors[f"output.stage{i + 1}"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("num_classes", [0, 3])
@torch.no_grad()
def test_another_number_of_classes_keeps_its_own_head(num_classes: int) -> None:
    model = tiny(num_classes=num_classes).eval()
    own = model.state_dict().get("head.weight")
    with pytest.warns(UserWarning, match=r"head.weight \(10, 20\) and head.bias \(10,\) are skipped"):
        model.load_authors(golden_state())
    if own is not None:
        assert torch.equal(cast(nn.Linear, model.head).weight, own)
    tensors = load_file(GOLDEN)
    features = model.forward_head(model.forward_features(tensors["input.x"]), pre_logits=True)
    torch.testing.assert_close(features, tensors["output.features"], rtol=1e-3, atol=1e-4)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit VAN; wrong shapes"):
        tiny(dims=(8, 12, 16, 24)).load_authors(golden_state())
    with pytest.raises(ValueError, match="missing: head.bias, head.weight"):
        tiny().load_authors({k: v for k, v in golden_state().items() if not k.startswith("head.")})


@pytest.mark.parametrize(
    ("name", "phase", "expected"),
    [
        ("van_b3", "imagenet_1k", {"drop_path": 0.2, "epochs": 300, "lr": 1e-3, "total_batch_size": 1024}),
        ("van_b4", "imagenet_22k", {"drop_path": 0.1, "epochs": 90, "num_classes": 21841}),
        ("van_b6", "fine_tuning", {"drop_path": 0.3, "weight_decay": 1e-8, "head_init_scale": 0.001}),
    ],
)
def test_recipes(name: str, phase: str, expected: dict[str, float]) -> None:
    recipe = van_recipe(name, phase)
    assert expected.items() <= recipe.items()
    fields = {key: recipe[key] for key in recipe.keys() & VANConfig.__dataclass_fields__.keys()}
    with torch.device("meta"):
        assert heed.create_model(name, **fields).config.drop_path == expected["drop_path"]


def test_bad_recipes() -> None:
    with pytest.raises(ValueError, match="unknown phase 'imagenet'"):
        van_recipe("van_b0", "imagenet")
    with pytest.raises(ValueError, match="unknown model with a recipe for imagenet_22k 'van_b0'"):
        van_recipe("van_b0", "imagenet_22k")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"images \(B, 3, H, W\)"),
        ((1, 1, 64, 64), r"input \(1, 1, 64, 64\): this model takes images \(B, 3, H, W\)"),
        ((1, 64, 64, 3), r"images \(B, 3, H, W\)"),
        ((1, 3, 0, 64), "0 x 64 pixels are too small; sides of at least 1"),
    ],
)
def test_bad_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))


def test_training_on_one_value_per_channel_is_explained() -> None:
    x = torch.randn(1, 3, 32, 20)
    with pytest.raises(ValueError, match="one image of 32 x 20 .* BatchNorm needs more than one"):
        tiny()(x)
    assert tiny().eval()(x).shape == (1, 10)
    assert tiny()(torch.randn(1, 3, 33, 20)).shape == (1, 10)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (1, 1)}, r"depths=\(1, 1\) need one entry per stage"),
        ({"mlp_ratios": (4, 4, 4)}, "need one entry per stage"),
        ({"kernel_size": 7, "dilation": 2}, "even dilated kernel of 4 x 4"),
        ({"combine": "mul"}, "unknown combine 'mul'"),
        ({"patch_size": 0}, "patch_size=0"),
    ],
)
def test_bad_settings(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


@pytest.mark.parametrize("side", [8, 13, 28, 32])
def test_micro_takes_small_images(side: int) -> None:
    assert heed.create_model("van_micro")(torch.randn(2, 1, side, side)).shape == (2, 10)


@pytest.mark.slow
def test_multiplying_by_the_gate_learns_digits_at_least_as_well_as_adding_it() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    train, test = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).tensor_split([1400])
    accuracy = {}
    for combine in ("multiply", "add"):
        torch.manual_seed(0)
        model = heed.create_model("van_micro", combine=combine)
        optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(6):
            for batch in train[torch.randperm(1400)].split(70):
                optimiser.zero_grad()
                F.cross_entropy(model.train()(x[batch]), y[batch]).backward()
                optimiser.step()
        with torch.no_grad():
            accuracy[combine] = (model.eval()(x[test]).argmax(1) == y[test]).float().mean().item()
    assert accuracy["multiply"] > 0.95
    assert accuracy["multiply"] >= accuracy["add"] - 0.01
