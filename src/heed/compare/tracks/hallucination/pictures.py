"""What the report shows beside the figures: questions on which the methods' answers differ, or that all get wrong."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heed.compare.results import Results
from heed.compare.tracks.hallucination.questions import FILE, Item, Questions, scene_image
from heed.compare.tracks.hallucination.scores import mentioned, says_yes
from heed.multimodal.ask import open_image

SHOWN = 8
_SIDE = 160  # pixels of a thumbnail


@dataclass(frozen=True)
class _Said:
    text: str
    right: bool


@dataclass(frozen=True)
class _Example:
    picture: str
    text: str
    truth: str
    said: dict[str, _Said]


def examples(results: Results, folder: Path) -> list[_Example]:
    """Questions with the answers of every method's first trial: first those the methods disagree on."""
    if not (folder / FILE).is_file():
        return []
    questions = Questions.read(folder / FILE)
    files = {
        row.method: folder / "trials" / f"{row.method}-0" / "answers.json"
        for row in results.methods
        if row.status == "ok"
    }
    answers = {method: json.loads(file.read_text()) for method, file in files.items() if file.is_file()}
    if not answers:
        return []
    known = sorted({name for item in questions.described for name in item.objects} | set(questions.synonyms))

    def judged(index: int) -> dict[str, _Said]:
        item = questions.items[index]
        return {
            method: _Said(texts[index], _right(item, texts[index], known, questions))
            for method, texts in answers.items()
        }

    def interest(index: int) -> tuple[bool, bool]:
        rights = [said.right for said in judged(index).values()]
        return len(set(rights)) == 1, all(rights)

    order = sorted(range(len(questions.items)), key=interest)
    found = []
    for index in order[:SHOWN]:
        item = questions.items[index]
        found.append(_Example(_thumbnail(item), item.text, item.label or ", ".join(item.objects), judged(index)))
    return found


def _right(item: Item, text: str, known: list[str], questions: Questions) -> bool:
    if item.label:
        return says_yes(text) == (item.label == "yes")
    return mentioned(text, known, questions.synonyms) <= set(item.objects)


def _thumbnail(item: Item) -> str:
    """A small picture as a data URI; nothing where the file is gone."""
    image: Any
    try:
        image = scene_image(item.image) if isinstance(item.image, int) else open_image(item.image)
    except ValueError:
        return ""
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
