"""Writing a model of transformers: whole or not at all, and without a progress bar across other output."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def save_whole(folder: Path, *parts: Any) -> None:
    """Save a model, and what belongs to it, such as its tokenizer, into a folder that appears when all of it is there.

    Args:
        folder: replaced when it exists.
        parts: whatever has `save_pretrained`.
    """
    from transformers.utils import logging

    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        for part in parts:
            part.save_pretrained(aside)
    finally:
        if shown:
            logging.enable_progress_bar()
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
