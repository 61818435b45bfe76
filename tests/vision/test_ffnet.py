"""FFNet: the published counts, fusing, its pyramid, the authors' checkpoints, segmentation and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import heed
import heed.timm
from heed.layers.metamixer import FFNifiedAttention
from heed.layers.reparam import fuse
from heed.vision.ffnet import ChannelMixer, FFBlock, FFNet, channel_conv
from heed.vision.ffnet_seg import FFNetSeg, crossed_depthwise, seg_block
from heed.vision.ffnet_training import DistillationLoss, ffnet_recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "53-metamixer" / "model_tiny.safetensors"
GOLDEN_CONFIG: dict[str, Any] = {
    "num_classes": 10, "stem_dim": 6, "dims": (6, 12, 12, 24), "depths": (1, 1, 2, 1), "layer_scale": 1e-6,
    "channel_kernels": (3, 3, 7, 7),
}  # fmt: skip
# Parameters and 10^9 multiply-adds at 256 pixels, fused and while training.
TABLE = {
    "ffnet_1": (13_660_152, 2.985, 13_775_656, 3.001),
    "ffnet_2": (26_908_440, 6.003, 27_208_408, 6.061),
    "ffnet_3": (48_330_632, 10.146, 48_817_896, 10.236),
    "ffnet_4": (79_200_360, 19.166, 79_868_968, 19.299),
}
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def tiny(**overrides: Any) -> FFNet:
    return cast(FFNet, heed.create_model("ffnet_1", **GOLDEN_CONFIG | {"drop_path": 0.0} | overrides))


def golden_state() -> dict[str, Tensor]:
    return {k.removeprefix("state."): v for k, v in load_file(GOLDEN).items() if k.startswith("state.")}


def gmacs(model: nn.Module, side: int) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", TABLE)
def test_published_counts(name: str) -> None:
    fused_parameters, fused_gmacs, parameters, train_gmacs = TABLE[name]
    with torch.device("meta"):
        model = heed.create_model(name).eval()
        fused = heed.create_model(name, fused=True).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in fused.parameters()) == fused_parameters
    assert gmacs(model, 256) == pytest.approx(train_gmacs, abs=6e-4)
    assert gmacs(fused, 256) == pytest.approx(fused_gmacs, abs=6e-4)
    if name == "ffnet_3":
        assert gmacs(fused, 384) == pytest.approx(22.828, abs=6e-4)
        assert gmacs(fused, 384) / gmacs(fused, 256) == pytest.approx(2.25, rel=1e-3)  # linear in pixels


@torch.no_grad()
def test_a_fused_model_is_the_same_function_and_is_saved_as_such(tmp_path: Path) -> None:
    model = tiny().load_authors(golden_state()).eval()
    x = torch.randn(2, 3, 45, 70)
    logits = model(x)
    assert model.fuse() is model
    assert model.config.fused
    torch.testing.assert_close(model(x), logits, **CLOSE)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(heed.from_pretrained(tmp_path)(x), model(x))
    assert model.state_dict().keys() == tiny(fused=True).state_dict().keys()
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        tiny().fuse()


def test_only_convolutions_and_gelu_are_left_before_the_head() -> None:
    model = tiny(num_classes=0).eval().fuse()
    graph = torch.export.export(model, (torch.randn(1, 3, 64, 64),)).graph
    called = {str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function"}
    # The last BatchNorm stays before the pooling; layer scale is a product with a vector.
    assert called <= {"conv2d", "gelu", "add", "mul", "view", "batch_norm", "mean"}


def test_stochastic_depth_rises_over_the_whole_network_and_blocks_share_it() -> None:
    model = tiny(drop_path=0.4)
    blocks = [block for block in model.modules() if isinstance(block, FFBlock)]
    assert [block.token.drop_path.drop_prob for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [block.channel.drop_path.drop_prob for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@torch.no_grad()
def test_initial_weights() -> None:
    model = cast(FFNet, heed.create_model("ffnet_3", depths=(1, 1, 1, 1)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.numel() > 5000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert module.bias is None or not module.bias.any()
    assert model.stages[0][0].token.scale.gamma[0].item() == pytest.approx(1e-6)  # type: ignore[index]


@torch.no_grad()
def test_layer_scale_of_zero_makes_a_block_the_identity() -> None:
    mixers = FFNifiedAttention(6), ChannelMixer(6, 3, channel_conv(6, 3))
    block = FFBlock(6, *mixers, layer_scale=0.0).eval()
    x = torch.randn(2, 6, 7, 5)
    assert torch.equal(block(x), x)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90))
@torch.no_grad()
def test_dense_maps_of_any_size_are_normalised_and_the_next_stage_sees_them_without(height: int, width: int) -> None:
    state = golden_state()
    dense, plain = tiny(dense=True, num_classes=0).load_authors(state).eval(), tiny().load_authors(state).eval()
    x = torch.randn(2, 3, height, width)
    found = dense.forward_intermediates(x, intermediates_only=True)
    for stage, without, info in zip(found, plain.stage_maps(x), dense.feature_info, strict=True):
        step = info["reduction"]
        assert stage.shape == (2, info["num_chs"], -(-height // step), -(-width // step))
        normed = F.layer_norm(without.movedim(1, -1), without.shape[1:2], eps=1e-6).movedim(-1, 1)
        torch.testing.assert_close(stage, normed, **CLOSE)


@torch.no_grad()
def test_shifts_with_the_picture() -> None:
    model = tiny(depths=(1, 1, 1, 1), key_kernels=(3,) * 4, value_kernels=(3,) * 4, channel_kernels=(3,) * 4).eval()
    x = torch.zeros(1, 3, 512, 64)
    x[:, :, 224:288] = torch.randn(1, 3, 64, 64)
    first, second = model.stage_maps(x)[-1], model.stage_maps(x.roll(32, 2))[-1]
    torch.testing.assert_close(first.roll(1, 2)[:, :, 4:12], second[:, :, 4:12], **CLOSE)


@pytest.mark.parametrize("layout", ["bare", "state_dict", "model", "encoder"])
@torch.no_grad()
def test_loads_the_authors_checkpoints(layout: str, tmp_path: Path) -> None:
    state: dict[str, Any] = golden_state()
    if layout == "encoder":
        state = {"state_dict": {f"module.encoder.{key}": value for key, value in state.items()}}
    torch.save(state if layout in ("bare", "encoder") else {layout: state}, tmp_path / "ffnet.pth")
    model = FFNet.from_authors(tmp_path / "ffnet.pth", "ffnet_1", **GOLDEN_CONFIG)
    tensors = load_file(GOLDEN)
    torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits"], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_loads_the_authors_dense_backbone(tmp_path: Path) -> None:
    """mmseg's layout: the backbone under a prefix, a norm per stage, another head beside it."""
    state = {f"backbone.{k}": v for k, v in golden_state().items() if not k.startswith(("head.", "norm."))}
    for i, dim in enumerate(GOLDEN_CONFIG["dims"]):
        state |= {f"backbone.norm{i}.weight": torch.full((dim,), 2.0), f"backbone.norm{i}.bias": torch.zeros(dim)}
    torch.save({"state_dict": state | {"decode_head.conv_seg.bias": torch.ones(3)}}, tmp_path / "upernet.pth")
    settings = GOLDEN_CONFIG | {"num_classes": 0, "dense": True}
    model = FFNet.from_authors(tmp_path / "upernet.pth", "ffnet_1", **settings)
    tensors = load_file(GOLDEN)
    maps = model.forward_intermediates(tensors["input.x"], intermediates_only=True)
    for i, stage in enumerate(maps):
        without = tensors[f"output.stage{i}"]
        normed = F.layer_norm(without.movedim(1, -1), without.shape[1:2], eps=1e-6).movedim(-1, 1)
        torch.testing.assert_close(stage, 2 * normed, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit FFNet; wrong shapes"):
        tiny(num_classes=7).load_authors(golden_state())
    with pytest.raises(ValueError, match="missing: head.bias, head.weight"):
        tiny().load_authors({k: v for k, v in golden_state().items() if not k.startswith("head.")})


def test_variants_that_the_authors_code_has() -> None:
    model = tiny(squeeze_excite=True, layer_norm=True)
    even = [hasattr(block.se, "fc1") for block in model.stages[2] if isinstance(block, FFBlock)]  # type: ignore[union-attr]
    assert even == [True, False]
    assert isinstance(model.norm, nn.Module)
    assert not isinstance(model.norm, nn.BatchNorm2d)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize("mixer", ["softmax", "identity"])
def test_other_mixers_in_the_same_slots(mixer: str) -> None:
    model = heed.create_model("ffnet_micro", mixers=("ffnified", mixer))
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert sum(isinstance(part, FFNifiedAttention) for part in model.modules()) == 2


def test_is_the_backbone_of_transformers_upernet() -> None:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.TimmBackboneConfig(
        backbone="heed_ffnet_micro", num_channels=1, out_indices=(0, 1), features_only=True
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=4, use_auxiliary_head=False, pool_scales=[1, 2]
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    assert isinstance(model, nn.Module)
    assert model(torch.randn(2, 1, 16, 24)).logits.shape == (2, 4, 16, 24)


def test_batchnorm_becomes_syncbatchnorm_and_fuses() -> None:
    model = cast(FFNet, nn.SyncBatchNorm.convert_sync_batchnorm(tiny())).eval()
    x = torch.randn(1, 3, 64, 64)
    logits = model(x)
    torch.testing.assert_close(model.fuse()(x), logits, **CLOSE)


def test_segmentation_costs_what_is_published() -> None:
    with torch.device("meta"):
        assert gmacs(heed.create_model("ffnet_seg", fused=True).eval(), 512) == pytest.approx(74, rel=0.01)


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_segmentation(fused: bool) -> None:
    small: dict[str, Any] = {"dims": (4, 8, 12, 16), "depths": (1, 1, 1, 1), "head_dim": 8, "last_dim": 12}
    model = cast(FFNetSeg, heed.create_model("ffnet_seg", num_labels=5, **small)).eval()
    x = torch.randn(1, 3, 75, 52)
    logits = model(x)
    assert logits.shape == (1, 5, 10, 7)
    assert [tuple(m.shape[1:]) for m in model.backbone(x)] == [(8, 10, 7), (12, 5, 4), (16, 3, 2)]
    if fused:
        torch.testing.assert_close(model.fuse()(x), logits, **CLOSE)
        assert model.state_dict().keys() == heed.create_model("ffnet_seg", fused=True, **small).state_dict().keys()


@settings(max_examples=6, deadline=None)
@given(st.sampled_from([3, 7, 9, 11]), st.integers(1, 9), st.integers(1, 9))
@torch.no_grad()
def test_crossed_kernels_fuse(kernel: int, height: int, width: int) -> None:
    conv = crossed_depthwise(3, kernel).train()
    conv(torch.randn(4, 3, 9, 9))  # running statistics that are nothing special
    conv.eval()
    assert len(conv.branches) == (3 if kernel == 3 else 4)
    x = torch.randn(2, 3, height, width)
    torch.testing.assert_close(fuse(conv)(x), conv(x), **CLOSE)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation(kind: str) -> None:
    teacher = nn.Linear(6, 4)
    images, logits = torch.randn(3, 6), torch.randn(3, 4, requires_grad=True)
    labels = torch.tensor([0, 3, 1])
    loss = DistillationLoss(teacher, kind=kind, alpha=0.25, temperature=2.0)(images, logits, labels)
    wanted = teacher(images)
    p, q = (wanted / 2).softmax(1), (logits / 2).softmax(1)
    taught = {"hard": F.cross_entropy(logits, wanted.argmax(1)), "soft": (p * (p / q).log()).sum() * 4 / 12}[kind]
    torch.testing.assert_close(loss, 0.75 * F.cross_entropy(logits, labels) + 0.25 * taught)
    loss.backward()
    assert teacher.weight.grad is None
    assert logits.grad is not None


def test_a_teacher_from_timm() -> None:
    teacher = timm.create_model("test_resnet", num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    loss = DistillationLoss(teacher)(images, tiny()(images), torch.tensor([1, 2]))
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ffnet_1", {}, {"drop_path": 0.1, "mixup": 0.2, "lr": 1e-3, "epochs": 300, "crop_pct": 0.9}),
        ("ffnet_2", {"distilled": True}, {"drop_path": 0.08, "mixup": 0.8}),
        ("ffnet_3", {}, {"drop_path": 0.35, "mixup": 0.8, "crop_pct": 0.95}),
        ("ffnet_4", {"fine_tune": True}, {"drop_path": 0.5, "lr": 5e-6, "weight_decay": 1e-8, "img_size": 384}),
    ],
)
def test_recipes(name: str, options: dict[str, bool], expected: dict[str, float]) -> None:
    assert expected.items() <= ffnet_recipe(name, **options).items()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"images \(B, 3, H, W\)"),
        ((1, 1, 64, 64), r"input \(1, 1, 64, 64\): this model takes images \(B, 3, H, W\)"),
        ((1, 3, 0, 64), "0 x 64 pixels are too small"),
    ],
)
def test_bad_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"images \(B, 3, H, W\)"):
        heed.create_model("ffnet_seg", dims=(4, 4), depths=(1, 1), kernels=(3, 3), head_dim=4, last_dim=4)(
            torch.zeros(shape)
        )


@torch.no_grad()
def test_one_pixel_is_left_of_small_images() -> None:
    assert tiny().eval().stage_maps(torch.randn(1, 3, 7, 31))[-1].shape == (1, 24, 1, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dims": (6, 12, 18, 36)}, "the 18 channels of stage 3 are no multiple of 12"),
        ({"key_kernels": (3, 3, 7)}, r"key_kernels=\(3, 3, 7\) needs 4 entries.*stage 4 has none"),
        ({"depths": (1, 1, 1, 1, 1)}, "there is no stage 5"),
        ({"value_kernels": (3, 4, 7, 7)}, "the kernel of stage 2 is even"),
        ({"channel_kernels": (3, 3, 3, 8)}, "the kernel of stage 4 is even"),
        ({"mixers": ("ffnified",) * 3 + ("sotfmax",)}, "unknown mixer 'sotfmax'; did you mean 'softmax'"),
    ],
)
def test_bad_settings(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: heed.create_model("ffnet_seg", kernels=(3, 3, 9)), "stage 4 has none"),
        (lambda: heed.create_model("ffnet_seg", upsampling="cubic"), "unknown upsampling 'cubic'"),
        (lambda: heed.create_model("ffnet_seg", dims=(4,), depths=(1,), kernels=(3,)), "give two or more"),
        (lambda: seg_block(8, 5), "kernel=5, ndim=2: branches for maps need a kernel of 3, or odd and at least 7"),
        (lambda: DistillationLoss(nn.Identity(), kind="warm"), "unknown kind of distillation 'warm'"),
        (lambda: DistillationLoss(nn.Identity(), alpha=2), "alpha=2 must be"),
        (lambda: DistillationLoss(nn.Identity(), temperature=0), "temperature=0 must be positive"),
        (lambda: DistillationLoss(nn.Identity())(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2)), "the teacher gives"),
        (lambda: ffnet_recipe("ffnet_4"), "unknown model with a recipe 'ffnet_4'"),
        (lambda: ffnet_recipe("ffnet_1", fine_tune=True), "unknown model with a recipe for fine-tuning 'ffnet_1'"),
    ],
)  # fmt: skip
def test_bad_parts(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
