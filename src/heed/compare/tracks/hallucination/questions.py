"""What is asked: questions as POPE has them, and images to describe, from a JSON file or about drawn scenes.

A file holds a list of objects, or one object per line:

    {"image": "cat.jpg", "text": "Is there a dog in the image?", "label": "no"}     a question
    {"image": "cat.jpg", "objects": ["cat", "sofa"]}                                 an image to describe

For descriptions, a first line {"synonyms": {"cat": ["kitten", "cats"]}} may give other words for objects; the objects
of all images together are the words that are looked for.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from heed.checkpoint import write_atomically
from heed.compare.tracks.hallucination.settings import SCENES, HallucinationSettings
from heed.multimodal.scenes import DESCRIBE, OBJECTS, draw_name, draw_scene, question

FILE = "questions.json"
DEFAULT = 600  # questions about scenes
DESCRIBED = 100  # scenes that are described, at most
_SEED = 2024  # of the scenes; training draws others


@dataclass(frozen=True)
class Item:
    """Something to ask.

    Args:
        image: the picture's file, or the number of a drawn scene.
        text: what is asked.
        label: "yes" or "no"; empty for a description.
        objects: what the image shows; for a description.
    """

    image: str | int
    text: str
    label: str = ""
    objects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Questions:
    """All that is asked.

    Args:
        name: the file, or "scenes".
        items: in order.
        synonyms: other words for objects.
        digest: of the images.
        notes: what was done to the data.
    """

    name: str
    items: tuple[Item, ...]
    synonyms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def asked(self) -> list[Item]:
        return [item for item in self.items if item.label]

    @property
    def described(self) -> list[Item]:
        return [item for item in self.items if not item.label]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "items": [vars(item) for item in self.items],
            "synonyms": self.synonyms,
            "digest": self.digest,
            "notes": self.notes,
        }

    def fingerprint(self) -> str:
        return hashlib.blake2b(json.dumps(self.to_json()).encode(), digest_size=16).hexdigest()

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(self.to_json()) + "\n")

    @classmethod
    def read(cls, path: Path) -> Questions:
        """Read what `save` wrote."""
        values = json.loads(path.read_text())
        items = tuple(Item(**{**item, "objects": tuple(item["objects"])}) for item in values["items"])
        synonyms = {name: tuple(words) for name, words in values["synonyms"].items()}
        return cls(values["name"], items, synonyms, values["digest"], tuple(values["notes"]))


def load_questions(settings: HallucinationSettings) -> Questions:
    """The questions that the settings name.

    Raises:
        ValueError: the file, an entry of it or an image is not what it should be, or nothing is asked.
    """
    if settings.data == SCENES:
        return _about_scenes(settings.questions or DEFAULT)
    return _from_file(Path(settings.data).expanduser(), settings)


def scene_image(number: int) -> Any:
    """The picture of a drawn scene."""
    return draw_scene(np.random.default_rng([_SEED, number])).image


def _about_scenes(count: int) -> Questions:
    items: list[Item] = []
    described: list[Item] = []
    for number in range((count + 1) // 2):
        random = np.random.default_rng([_SEED, number])
        scene = draw_scene(random)
        for label in ("yes", "no"):
            items.append(Item(number, question(draw_name(scene, label == "yes", random)), label))
        if number < DESCRIBED:
            described.append(Item(number, DESCRIBE, objects=tuple(scene.names)))
    known = dict.fromkeys(OBJECTS, ())
    return Questions(SCENES, (*items[:count], *described), known, notes=("scenes are drawn, none is trained on",))


def _from_file(path: Path, settings: HallucinationSettings) -> Questions:
    if not path.is_file():
        raise ValueError(f"data={str(path)!r}: there is no such file; give a JSON file of questions, or {SCENES!r}")
    folder = Path(settings.images).expanduser() if settings.images else path.parent
    synonyms: dict[str, tuple[str, ...]] = {}
    items: list[Item] = []
    for number, entry in enumerate(_entries(path), 1):
        if "synonyms" in entry and "image" not in entry:
            synonyms |= {name: tuple(words) for name, words in entry["synonyms"].items()}
            continue
        items.append(_item(entry, folder, f"{path}, entry {number}"))
    asked = [item for item in items if item.label]
    if not asked:
        raise ValueError(f"{path} asks no question with a label; methods are ranked by the answers to such")
    chosen = (*asked[: settings.questions], *(item for item in items if not item.label))
    digest = hashlib.blake2b(digest_size=16)
    for image in dict.fromkeys(str(item.image) for item in chosen):
        digest.update(Path(image).read_bytes())
    return Questions(path.name, chosen, synonyms, digest.hexdigest())


def _entries(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    try:
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            values = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is neither JSON nor one JSON object per line: {error}") from error
    values = values if isinstance(values, list) else [values]
    if not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{path} must hold objects with image, text and label")
    return values


def _item(entry: dict[str, Any], folder: Path, where: str) -> Item:
    if "image" not in entry:
        raise ValueError(f"{where} names no image")
    image = folder / str(entry["image"])
    if not image.is_file():
        raise ValueError(f"{where}: there is no image {image}; give its folder with --images")
    if "label" not in entry:
        if not isinstance(entry.get("objects"), list):
            raise ValueError(f"{where} has neither a label ('yes' or 'no') nor a list of objects")
        return Item(str(image.resolve()), entry.get("text", DESCRIBE), objects=tuple(map(str, entry["objects"])))
    label = str(entry["label"]).strip().lower()
    if label not in ("yes", "no") or not entry.get("text"):
        raise ValueError(f"{where}: label={entry['label']!r} must be 'yes' or 'no', and text the question")
    return Item(str(image.resolve()), str(entry["text"]), label)
