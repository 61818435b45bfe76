"""Models by name: configs as data, saving, loading, and the authors' checkpoints."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn

from heed.catalogue import load_rooms
from heed.checkpoint import load_weights, read_weights, write_weights
from heed.errors import unknown
from heed.registry import Registry

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """A model name: the class it builds and its configuration."""

    cls: type[HeedModel]
    config: Any


models: Registry[Entry] = Registry("model", load_rooms)


class HeedModel(nn.Module, PyTorchModelHubMixin, library_name="heed"):
    """Base of all models: built from a frozen dataclass, saved as safetensors, loadable from the authors' files.

    A subclass sets `Config`, takes `config` as its only argument, calls `super().__init__(config)` first, and maps the
    names in the authors' checkpoints with `authors_key` where they differ from its own.
    """

    Config: ClassVar[type]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def _describe(self) -> dict[str, Any]:
        """What config.json says; "architecture" and "num_classes" are what timm reads."""
        name = next((n for n in models._entries if models._entries[n].cls is type(self)), type(self).__name__)
        exact = [n for n, e in models._entries.items() if e.cls is type(self) and e.config == self.config]
        settings = dataclasses.asdict(self.config)
        described: dict[str, Any] = {"architecture": f"heed_{(exact or [name])[0]}", "model_args": settings}
        if "num_classes" in settings:
            described["num_classes"] = settings["num_classes"]
        return described

    def _save_pretrained(self, save_directory: Path) -> None:
        self._hub_mixin_config = self._describe()  # as the model is now: its classifier may have been exchanged
        write_weights(self, save_directory / _WEIGHTS)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: dict[str, Any] | None = None,
        map_location: str = "cpu",
        strict: bool = True,
        **hub: Any,
    ) -> Self:
        if config is None:
            raise ValueError(f"{model_id} has no config.json; it was not written by save_pretrained")
        name = str(config.get("architecture", "")).removeprefix("heed_")
        entry = models.get(name)
        model = entry.cls(config_from_dict(entry.cls.Config, config["model_args"]))
        if not isinstance(model, cls):
            raise ValueError(f"{model_id} holds a {type(model).__name__}, not a {cls.__name__}")
        folder = Path(model_id)
        path = folder / _WEIGHTS if folder.is_dir() else Path(hf_hub_download(model_id, _WEIGHTS, **hub))
        load_weights(model, read_weights(path), str(path))
        if "pretrained_cfg" in config:
            model.pretrained_cfg = config["pretrained_cfg"]
        return model.to(map_location).eval()

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        """This class's name for a key of the authors' checkpoint; None when the entry is not needed."""
        return key

    def load_authors(self, weights: dict[str, Tensor], source: str = "the authors' weights") -> Self:
        """Load a state dict that uses the authors' names."""
        renamed = {new: value for key, value in weights.items() if (new := self.authors_key(key)) is not None}
        load_weights(self, renamed, source)
        return self

    @classmethod
    def from_authors(cls, path: str | Path, name: str, **overrides: Any) -> Self:
        """The model `name` (with config overrides) with the weights of a checkpoint the authors released."""
        model = create_model(name, **overrides)
        if not isinstance(model, cls):
            raise ValueError(f"{name!r} is a {type(model).__name__}, not a {cls.__name__}")
        return model.load_authors(read_weights(path), str(path)).eval()


def register_models(cls: type[HeedModel], **configs: Any) -> None:
    """Register one class under several names, each with its configuration."""
    for name, config in configs.items():
        models.add(name, Entry(cls, config))


def create_model(name: str, **overrides: Any) -> HeedModel:
    """A new model by name, e.g. create_model("litv2_s", num_classes=10).

    Args:
        name: see `heed.models.models.names()`.
        overrides: fields of the model's config to change.

    Raises:
        ValueError: unknown name or unknown field, with the nearest known ones.
    """
    entry = models.get(name)
    fields = {field.name for field in dataclasses.fields(entry.config)}
    for key in overrides:
        if key not in fields:
            raise ValueError(unknown(f"setting of {name}", key, fields))
    return entry.cls(dataclasses.replace(entry.config, **overrides))


def from_pretrained(path: str | Path, **hub: Any) -> HeedModel:
    """A model saved by `save_pretrained`, from a folder or a hub id; the class is read from its config.json."""
    config = Path(path) / "config.json"
    if Path(path).is_dir():
        if not config.is_file():
            raise ValueError(f"{path} holds no config.json; give a folder written by save_pretrained")
        try:
            json.loads(config.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{config} is not valid JSON (truncated?): {error}") from error
    return HeedModel.from_pretrained(str(path), **hub)


def config_from_dict(cls: type, values: dict[str, Any]) -> Any:
    """A config dataclass from JSON: lists become tuples, unknown fields are an error."""
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ValueError(unknown(f"field of {cls.__name__}", key, fields))
    return cls(**{key: _tuples(value) for key, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
