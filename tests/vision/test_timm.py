"""Every registered image model through timm's own interface; a new model joins by being registered."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor

import heed
import heed.timm
from heed.models import HeedModel, models
from heed.vision.backbone import Backbone

NAMES = [name for name in models.names() if issubclass(models.get(name).cls, Backbone)]
# The whole matrix runs once per class, on the first name it registered, which is its smallest.
_FIRST: dict[type[HeedModel], str] = {}
for _name, _entry in models._entries.items():
    _FIRST.setdefault(_entry.cls, _name)
CLASSES = [name for name in NAMES if name in _FIRST.values()]


def _tiny(name: str) -> dict[str, Any]:
    """Settings that shorten a model without changing what it is made of."""
    config = models.get(name).config
    shorter = {"depth": lambda depth: min(depth, 2), "depths": lambda depths: tuple(min(d, 2) for d in depths)}
    fields = {field.name for field in dataclasses.fields(config)}
    return {key: shorten(getattr(config, key)) for key, shorten in shorter.items() if key in fields}


def _create(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(f"heed_{name}", **_tiny(name) | options).eval()


def _images(model: Any, batch: int = 2, channels: int | None = None) -> Tensor:
    own, height, width = model.pretrained_cfg["input_size"]
    return torch.randn(batch, channels or own, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_is_registered_with_a_description(name: str) -> None:
    assert timm.is_model(f"heed_{name}")
    described = timm.get_pretrained_cfg(f"heed_{name}")
    config = models.get(name).config
    assert described is not None
    assert described.num_classes == config.num_classes
    assert described.classifier == "head"
    assert len(described.mean) == len(described.std) == described.input_size[0]


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_classifier_and_features(name: str) -> None:
    model = _create(name, num_classes=5)
    images = _images(model)
    features = model.forward_features(images)
    assert features.shape[:2] == (2, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    logits = model(images)
    assert logits.shape == (2, 5)
    torch.testing.assert_close(logits, model.forward_head(features))
    stem = model.get_submodule(model.pretrained_cfg["first_conv"])
    assert stem.weight.shape[1] == images.shape[1]
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    assert resolve_data_config(model=model)["input_size"] == tuple(images.shape[1:])
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), model.forward_head(features, pre_logits=True))


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_intermediates_and_pyramid(name: str) -> None:
    model = _create(name)
    images = _images(model)
    final, maps = model.forward_intermediates(images)
    torch.testing.assert_close(final, model.forward_features(images))
    for stage, info in zip(maps, model.feature_info, strict=True):
        assert stage.shape == (2, info["num_chs"], *(side // info["reduction"] for side in images.shape[2:]))
        model.get_submodule(info["module"])
    with pytest.raises(ValueError, match="stages"):
        model.forward_intermediates(images, indices=len(maps) + 1)

    pyramid = _create(name, features_only=True)
    assert [stage.shape[1] for stage in pyramid(images)] == pyramid.feature_info.channels()
    last = _create(name, features_only=True, out_indices=(-1,))
    torch.testing.assert_close(last(images), [maps[-1]])
    assert last.feature_info.reduction() == [model.feature_info[-1]["reduction"]]


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_saved_by_heed_loads_in_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = heed.create_model(name, **_tiny(name) | {"num_classes": 5}).eval()
    model.reset_classifier(3)  # type: ignore[operator] - what is saved is the model as it is now
    model.save_pretrained(tmp_path)
    loaded: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = _images(loaded)
    torch.testing.assert_close(loaded(images), model(images))
    torch.testing.assert_close(heed.from_pretrained(tmp_path)(images), model(images))
    by_path = _create(name, num_classes=3, checkpoint_path=tmp_path / "model.safetensors")
    torch.testing.assert_close(by_path(images), model(images))
    other: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=4).eval()
    assert other(images).shape == (2, 4)
    torch.testing.assert_close(other.forward_features(images), model.forward_features(images))  # type: ignore[operator]


def test_the_normalisation_a_model_was_trained_with_is_kept(tmp_path: Path) -> None:
    model = heed.create_model("vit_micro")
    model.pretrained_cfg = {"mean": [0.3], "std": [0.4]}
    model.save_pretrained(tmp_path / "one")
    again: Any = heed.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    for folder in ("one", "two"):
        data = resolve_data_config(model=timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True))
        assert (data["mean"], data["std"]) == ([0.3], [0.4])
    assert again.pretrained_cfg["mean"] == [0.3]


@torch.no_grad()
def test_timm_adapts_the_stem_to_other_channels(tmp_path: Path) -> None:
    heed.create_model("vit_micro", num_classes=3).save_pretrained(tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=3).eval()
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 3)


def test_what_timms_training_script_passes_is_understood() -> None:
    model = _create("vit_micro", drop_rate=0.0, drop_path_rate=0.2, global_pool="avg", img_size=(16, 16))
    assert model.config.drop_path == 0.2
    assert model.config.img_size == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_rate": 0.1}, "setting of vit_micro 'drop_rate'"),
        ({"img_size": (8, 16)}, "square"),
        ({"attentoin": "softmax"}, "did you mean 'attention'"),
        ({"global_pool": "max"}, "global_pool"),
    ],
)
def test_settings_a_model_lacks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("heed_vit_micro", **options)
