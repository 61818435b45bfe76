"""Docstrings are plain text: `[a][b]` in them is an index, not a link."""

from __future__ import annotations

from typing import Any

import griffe


class PlainText(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("][", "]\\[")
