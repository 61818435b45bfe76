"""Code that executes attention under a pattern.

Each backend is a module with `refuse(call) -> str | None` (why it cannot run the call, or None) and
`run(call) -> Result`. The table below is the only place that knows them all; a new backend adds one line.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

NAMES = ("reference", "sdpa", "tiled", "flex")


def backend(name: str) -> ModuleType:
    return import_module(f"heed.engine.backends.{name}")
