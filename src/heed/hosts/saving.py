"""Writing a model of transformers: whole or not at all, and without a progress bar across other output."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from heed.hosts.quiet import no_progress_bars


def save_whole(folder: Path, *parts: Any) -> None:
    """Save a model, and what belongs to it, such as its tokenizer, into a folder that appears when all of it is there.

    Args:
        folder: replaced when it exists.
        parts: whatever has `save_pretrained`.
    """
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with no_progress_bars():
        for part in parts:
            part.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
