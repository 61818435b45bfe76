"""What a reader of image data hands over: arrays of one size, and what had to be left out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Split:
    """Images of one size with their labels.

    Args:
        images: (n, H, W) or (n, H, W, channels), uint8 or any other numbers.
        labels: (n,) integers.
        names: what each image is called in messages.
    """

    images: np.ndarray
    labels: np.ndarray
    names: Sequence[str]

    def keep(self, chosen: np.ndarray) -> Split:
        """The images where `chosen` (n,) is True."""
        names = [name for name, kept in zip(self.names, chosen, strict=True) if kept]
        return Split(self.images[chosen], self.labels[chosen], names)


@dataclass
class Raw:
    """A data set as a reader found it; `test` is None when the source has no test split."""

    classes: list[str]
    train: Split
    test: Split | None


@dataclass
class Notes:
    """Collects what is wrong with the data but need not end the run; under `strict` the first such thing ends it.

    Args:
        strict: raise ValueError instead of going on.
    """

    strict: bool = False
    lines: list[str] = field(default_factory=list)
    _left_out: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Something the user should know, in one line."""
        self.lines.append(line)

    def doubt(self, line: str) -> None:
        """Something the user may not want: ends a strict run, is a warning otherwise."""
        if self.strict:
            raise ValueError(f"{line} (--strict)")
        self.add(line)
        warnings.warn(line, stacklevel=3)

    def leave_out(self, name: str, reason: object) -> None:
        """A sample that cannot be used, with its name."""
        line = f"{name}: {reason}"
        if self.strict:
            raise ValueError(f"{line} (--strict)")
        self._left_out.append(line)

    def close(self) -> tuple[str, ...]:
        """All lines; warns of the samples left out, naming the first of them."""
        if self._left_out:
            count = len(self._left_out)
            more = f"; and {count - 5} more" if count > 5 else ""
            self.doubt(f"{count} unusable image(s) left out: {'; '.join(self._left_out[:5])}{more}")
            self._left_out.clear()
        return tuple(self.lines)
