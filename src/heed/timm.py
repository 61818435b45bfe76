"""heed's image models in timm's registry: after `import heed.timm`, `timm.create_model("heed_vit_tiny")` builds one.

Every registered `Backbone` becomes `heed_<name>`. Settings of the model's configuration are keyword arguments, next to
timm's own (`drop_path_rate`, `features_only`, `out_indices`, `checkpoint_path`). A folder written by `save_pretrained`
loads as `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet

from heed.errors import unknown
from heed.models import Entry, config_from_dict, models
from heed.vision.backbone import Backbone

__all__: list[str] = []  # timm adds the names of the models


def _settings(name: str, config: Any, options: dict[str, Any]) -> dict[str, Any]:
    """timm's keyword arguments as fields of a heed configuration; what a model has no setting for must be neutral."""
    fields = {field.name for field in dataclasses.fields(config)}
    # timm's training script passes these to every model, and stands for "nothing special" with the values given here.
    neutral = {"drop_rate": (0.0,), "drop_path_rate": (0.0,), "global_pool": ("avg", ""), "in_chans": (3,)}
    settings: dict[str, Any] = {}
    for key, value in options.items():
        field = "drop_path" if key == "drop_path_rate" and key not in fields else key
        if field == "img_size" and isinstance(value, list | tuple) and isinstance(getattr(config, field, None), int):
            height, width = value
            if height != width:
                raise ValueError(f"img_size={tuple(value)}: {name} takes square images")
            value = height
        if field in fields:
            settings[field] = value
        elif value not in neutral.get(key, ()):
            raise ValueError(unknown(f"setting of {name}", key, fields))
    return settings


def _build(name: str, entry: Entry, **options: Any) -> Backbone:
    base = {field.name: getattr(entry.config, field.name) for field in dataclasses.fields(entry.config)}
    model: Any = entry.cls(config_from_dict(entry.cls.Config, base | _settings(name, entry.config, options)))
    model._traits = {"first_conv": model.first_conv}  # how a model tells timm about its stem
    return model


def _pyramid(model: Backbone, out_indices: Any = None, **options: Any) -> FeatureGetterNet:
    """`features_only`: the maps of the last four stages (fewer where there are fewer), or of those asked for."""
    model.reset_classifier(0)
    if out_indices is None:
        out_indices = min(4, len(model.feature_info))
    return FeatureGetterNet(model, out_indices=out_indices, **options)


def _entrypoint(name: str, entry: Entry) -> Callable[..., Any]:
    def create(pretrained: bool = False, **options: Any) -> Any:
        model = build_model_with_cfg(
            partial(_build, name, entry),
            f"heed_{name}",
            pretrained,
            feature_cfg={"out_indices": None, "feature_cls": _pyramid},
            **options,
        )
        backbone = cast(Backbone, model.model if isinstance(model, FeatureGetterNet) else model)
        cast(dict[str, Any], model.pretrained_cfg)["first_conv"] = backbone.first_conv
        return model

    create.__name__ = create.__qualname__ = f"heed_{name}"
    create.__doc__ = f"{entry.cls.__name__} with the configuration {name!r} and timm's keyword arguments."
    return create


_entries = {name: models.get(name) for name in models.names()}
_entries = {name: entry for name, entry in _entries.items() if issubclass(entry.cls, Backbone)}
# register_model reads this name from the module of the entry point.
default_cfgs = generate_default_cfgs(
    {f"heed_{name}": cast(type[Backbone], entry.cls).describe_input(entry.config) for name, entry in _entries.items()}
)
for _name, _entry in _entries.items():
    register_model(_entrypoint(_name, _entry))
