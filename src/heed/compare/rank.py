"""Who is better than whom, given that a few seeds are few: mean, spread, ties, rank."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from heed.compare.results import Accuracy, MethodResult


def accuracy_over_seeds(per_seed: Sequence[float | None]) -> Accuracy:
    """Mean and sample standard deviation over the seeds that finished; None marks one that did not."""
    finished = [value for value in per_seed if value is not None]
    mean = statistics.fmean(finished) if finished else None
    spread = statistics.stdev(finished) if len(finished) > 1 else None
    return Accuracy(mean, spread, tuple(per_seed))


def rank(rows: Sequence[MethodResult], test_images: int) -> tuple[MethodResult, ...]:
    """The rows in order, with rank and ties filled in; failed methods come last and have neither.

    Two methods are tied when their means differ by no more than the larger of their spreads. A method's rank is 1 + the
    number of methods that are better and not tied with it. With one seed there is no spread, and the standard error
    of an accuracy over `test_images` images, sqrt(p (1 - p) / n), stands in for it.

    Args:
        rows: one per method.
        test_images: how many images the accuracies are over.
    """
    compared = [row for row in rows if row.status == "ok"]
    compared.sort(key=lambda row: -_mean(row))
    ranked = []
    for row in compared:
        tied = tuple(other.method for other in compared if other is not row and _tied(row, other, test_images))
        better = [other for other in compared if _mean(other) > _mean(row) and other.method not in tied]
        ranked.append(dataclasses.replace(row, rank=1 + len(better), tied_with=tied))
    # The sort is stable: methods of one rank stay in the order of their means.
    ranked.sort(key=lambda row: row.rank)
    return (*ranked, *(row for row in rows if row.status != "ok"))


def _mean(row: MethodResult) -> float:
    if row.accuracy.mean is None:
        raise ValueError(f"{row.method} has status 'ok' and no accuracy")
    return row.accuracy.mean


def _tied(a: MethodResult, b: MethodResult, test_images: int) -> bool:
    return abs(_mean(a) - _mean(b)) <= max(_spread(a, test_images), _spread(b, test_images))


def _spread(row: MethodResult, test_images: int) -> float:
    if row.accuracy.spread is not None:
        return row.accuracy.spread
    return math.sqrt(_mean(row) * (1 - _mean(row)) / test_images)
