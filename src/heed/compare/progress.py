"""News from a running comparison, and a live display of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


@dataclass(frozen=True)
class Progress:
    """One piece of news.

    Args:
        method: whose.
        seed: of which trial; None while the method is measured.
        stage: what is going on, or how it ended.
        step, steps: what is done, and to be done; 0 while measuring, and where a track does not count.
        loss: mean training loss lately; None when there is none.
        score: the last that was taken, in words: "accuracy 97.8 %".
        error: what went wrong, when the stage is "failed".
    """

    method: str
    seed: int | None
    stage: Literal["measuring", "measured", "training", "trained", "failed"]
    step: int = 0
    steps: int = 0
    loss: float | None = None
    score: str | None = None
    error: str | None = None


Report = Callable[[Progress], None]


class LiveProgress:
    """A live display in the terminal: one bar for the whole run and one for every trial under way.

        with LiveProgress(settings.methods, settings.seeds) as show:
            heed.compare.run(settings, on_progress=show)

    Args:
        methods: names.
        seeds: trials per method.
        console: where to draw; None for the terminal.
    """

    def __init__(self, methods: Sequence[str], seeds: int, console: Console | None = None) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._whole = self._bars.add_task("trials", total=len(methods) * seeds, news="")
        self._seeds = seeds
        self._rows: dict[tuple[str, int | None], TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._bars.live.transient = error is not None  # what went wrong is said below, not under an idle bar
        self._bars.stop()

    def __call__(self, news: Progress) -> None:
        """Show a piece of news."""
        if news.stage == "measuring":
            self._bars.update(self._whole, news=f"measuring {news.method}")
        elif news.stage == "training":
            self._bars.update(self._whole, news="")
            parts = [f"loss {news.loss:.3f}"] if news.loss is not None else []
            parts += [news.score] if news.score is not None else []
            self._bars.update(self._row(news), completed=news.step, total=news.steps, news="  ".join(parts))
        elif news.stage == "trained":
            self._end(news, news.score or "done")
        elif news.stage == "failed":
            self._end(news, f"[red]failed[/red]: {news.error}")

    def _row(self, news: Progress) -> TaskID:
        key = (news.method, news.seed)
        if key not in self._rows:
            self._rows[key] = self._bars.add_task(f"{news.method}, seed {news.seed}", total=news.steps or None, news="")
        return self._rows[key]

    def _end(self, news: Progress, line: str) -> None:
        """Trade the trial's bar for a line that stays; a method that cannot be measured ends all its trials."""
        if (news.method, news.seed) in self._rows:
            self._bars.remove_task(self._rows.pop((news.method, news.seed)))
        trial = news.method if news.seed is None else f"{news.method}, seed {news.seed}"
        self._bars.console.print(f"{trial}: {line}", highlight=False)
        self._bars.advance(self._whole, self._seeds if news.seed is None else 1)
