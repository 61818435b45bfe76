"""How heed words its errors: the offending value first, the remedy after it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 60  # names in a message


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """A message for a name nobody registered, with the nearest names that somebody did."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if near:
        return f"unknown {kind} {name!r}; did you mean {' or '.join(map(repr, near))}?"
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"unknown {kind} {name!r}; known: {', '.join(names[:_SHOWN]) or 'none'}{rest}"


class MissingExtra(ImportError):
    """An optional dependency is absent; says which extra installs it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs {package!r}, which is not installed: pip install 'heed[{extra}]'")
