"""Pictures for the report of `cache`: at which depths of the prompt each method finds pass keys."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from heed.compare.results import Results
from heed.compare.tracks.cache.settings import FOUND

_PARTS = 10  # of the depth


@dataclass(frozen=True)
class Depth:
    """Keys told in one part of the prompt: how many, and the share of them that was found."""

    keys: int
    share: float


def depths(results: Results, folder: Path) -> dict[str, list[Depth | None]]:
    """Per method, ten parts of the prompt from its beginning to its end; None for a part without keys."""
    shown = {}
    for row in results.methods:
        kept = [folder / "trials" / f"{row.method}-{curve.seed}" / FOUND for curve in row.curves]
        found = [key for path in kept if path.is_file() for key in json.loads(path.read_text())]
        if row.status == "ok" and found:
            parts: list[list[bool]] = [[] for _ in range(_PARTS)]
            for depth, right in found:
                parts[min(int(depth * _PARTS), _PARTS - 1)].append(right)
            shown[row.method] = [Depth(len(part), sum(part) / len(part)) if part else None for part in parts]
    return shown
