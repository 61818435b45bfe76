"""Things that are created by name: attention layers and models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from heed.errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Names and what they stand for; an unknown name raises ValueError with the nearest known ones.

    Args:
        kind: what is registered, in words, for error messages.
        load: imports the modules that register entries; called before the first look-up.
    """

    def __init__(self, kind: str, load: Callable[[], None]) -> None:
        self.kind = kind
        self._load = load
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""
        return lambda entry: self.add(name, entry)

    def get(self, name: str) -> T:
        self._load()
        if name not in self._entries:
            raise ValueError(unknown(self.kind, name, self._entries))
        return self._entries[name]

    def names(self) -> list[str]:
        self._load()
        return sorted(self._entries)
