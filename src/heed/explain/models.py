"""Vision transformers and pictures by name, for the command line: what a model is called, and how it takes its images.

A model is a folder or the name of one of heed's, timm's or transformers' models. Pictures are the files of a folder;
where it holds class folders, these give the labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed.data.folder import SUFFIXES
from heed.errors import MissingExtra, unknown
from heed.models import create_model, from_pretrained, models
from heed.vision.backbone import Backbone


@dataclass(frozen=True)
class Loaded:
    """A model ready to look at pictures.

    Args:
        name: what reports call it.
        model: in evaluation mode.
        prepare: a PIL image to a tensor (C, H, W) as the model takes it.
        classes: names of its classes, in order; empty where it does not say.
    """

    name: str
    model: nn.Module
    prepare: Callable[[Any], Float[Tensor, "C H W"]]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of a folder: images (n, C, H, W), labels (n,) or None, and what the reader should know."""

    images: Float[Tensor, "n C H W"]
    labels: Int[Tensor, " n"] | None
    notes: tuple[str, ...]


def load_model(name: str, *, untrained: bool = False) -> Loaded:
    """A vision transformer by name.

    Args:
        name: a folder that heed, timm or transformers saved a model to; a name of heed's (which has no weights), of
            timm's ("vit_small_patch16_224", "hf-hub:..."), or an id of transformers' on the Hub ("google/vit-...").
        untrained: build a model of timm by its name without its weights.

    Raises:
        ValueError: nothing is called so.
        OSError: the weights cannot be had.
        MissingExtra: transformers is needed and not installed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(folder)
    if name in models.names():
        return _of_timm(name, create_model(name).eval())
    if name.startswith("hf-hub:") or timm.is_model(name):
        return _of_timm(name, timm.create_model(name, pretrained=not untrained).eval())
    if "/" in name and not name.startswith((".", "/", "~")):
        return _of_transformers(name, name)
    known = [*models.names(), *timm.list_models("vit*"), *timm.list_models("deit*")]
    raise ValueError(f"{unknown('model', name, known)}; folders and Hub ids of transformers are taken as well")


def read_pictures(folder: str | Path, loaded: Loaded, limit: int | None = None) -> Pictures:
    """The pictures of a folder as a model takes them.

    Class folders give labels when they are named as the model's classes, or are as many as these and so stand for them
    in the order of their names. Otherwise there are no labels, and the notes say so.

    Args:
        folder: with pictures, or with one folder of pictures per class.
        loaded: the model.
        limit: at most so many pictures, spread evenly over the folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no pictures, or one that cannot be read.
        MissingExtra: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("pillow", "compare") from error
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"images {str(folder)!r}: there is no such folder")
    files = sorted(
        path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not files:
        raise ValueError(f"{root} holds no pictures; known are {', '.join(sorted(SUFFIXES))}")
    if limit is not None and len(files) > limit:
        files = [files[(2 * i + 1) * len(files) // (2 * limit)] for i in range(limit)]
    labels, note = _labels(files, root, loaded)
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(loaded.prepare(image))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{file} cannot be read as a picture: {error}; remove it") from error
    return Pictures(torch.stack(images), labels, note)


def _labels(files: list[Path], root: Path, loaded: Loaded) -> tuple[Tensor | None, tuple[str, ...]]:
    folders = sorted({path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")})
    found = [file.relative_to(root).parts[0] for file in files if len(file.relative_to(root).parts) > 1]
    if not found:
        return None, ()
    count = int(getattr(loaded.model, "num_classes", 0) or getattr(_config(loaded.model), "num_labels", 0) or 0)
    names = [name.lower() for name in loaded.classes]
    numbers = {name: names.index(name.lower()) for name in folders if name.lower() in names}
    if len(numbers) < len(folders) and len(folders) == count:
        numbers = {name: number for number, name in enumerate(folders)}
    if len(found) < len(files) or any(name not in numbers for name in found):
        note = (
            f"the {len(folders)} folders of {root.name} are not the model's {count} classes by name or by number, so "
            "its own predictions stand for the labels"
        )
        return None, (note,)
    return torch.tensor([numbers[name] for name in found]), ()


def _from_folder(folder: Path) -> Loaded:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no config.json; give a folder that heed, timm or transformers saved a model to"
        )
    config = json.loads(path.read_text())
    if str(config.get("architecture", "")).startswith("heed_"):
        return _of_timm(folder.name, from_pretrained(folder))
    if "architecture" in config:
        return _of_timm(folder.name, timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    return _of_transformers(folder.name, str(folder))


def _of_timm(name: str, model: Any) -> Loaded:
    """heed's and timm's models say in timm's way how they take their images."""
    from timm.data import create_transform, resolve_model_data_config

    described = getattr(model, "pretrained_cfg", None) or {}
    if isinstance(model, Backbone):
        described = {**model.describe_input(model.config), **described}
        settings = {**{k: described[k] for k in ("input_size", "mean", "std")}, "crop_pct": 1.0, "crop_mode": "squash"}
    else:
        settings = resolve_model_data_config(model)
    transform: Any = create_transform(**settings, is_training=False)
    mode = "L" if settings["input_size"][0] == 1 else "RGB"
    classes = tuple(described.get("label_names") or ())
    return Loaded(name, model, lambda image: transform(image.convert(mode)), classes)


def _of_transformers(name: str, source: str) -> Loaded:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "multimodal") from error
    config: Any = transformers.AutoConfig.from_pretrained(source)
    vision = getattr(config, "vision_config", None)
    classifies = any("ForImageClassification" in kind for kind in getattr(config, "architectures", None) or ())
    if classifies:
        model = transformers.AutoModelForImageClassification.from_pretrained(source)
    elif vision is not None:  # the vision tower of a model of two
        model = transformers.AutoModel.from_pretrained(source).vision_model
    else:
        model = transformers.AutoModel.from_pretrained(source)
    processor: Any = transformers.AutoImageProcessor.from_pretrained(source)
    labels = getattr(config, "id2label", None) or {}
    classes = tuple(labels[i] for i in range(len(labels))) if classifies else ()
    return Loaded(
        name,
        model.eval(),
        lambda image: processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0],
        classes,
    )


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)
