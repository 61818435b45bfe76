"""Who is better than whom, given that a few seeds are few: mean, spread, ties, rank."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from heed.compare.results import MethodResult, Metric, Score


def score_over_seeds(per_seed: Sequence[float | None]) -> Score:
    """Mean and sample standard deviation over the seeds that finished; None marks one that did not."""
    finished = [value for value in per_seed if value is not None]
    mean = statistics.fmean(finished) if finished else None
    spread = statistics.stdev(finished) if len(finished) > 1 else None
    return Score(mean, spread, tuple(per_seed))


def rank(rows: Sequence[MethodResult], metric: Metric, tested: int) -> tuple[MethodResult, ...]:
    """The rows in order, with rank and ties filled in; failed methods come last and have neither.

    Two methods are tied when their means differ by no more than the larger of their spreads. A method's rank is 1 + the
    number of methods that are better and not tied with it. With one seed there is no spread, and the standard error
    of a share of `tested` examples, sqrt(p (1 - p) / n), stands in for it; scores that are no shares then tie within
    the metric's margin.

    Args:
        rows: one per method.
        metric: what they are ranked by.
        tested: how many examples the scores are over.
    """
    compared = [row for row in rows if row.status == "ok"]
    sign = 1 if metric.better == "higher" else -1
    compared.sort(key=lambda row: -sign * _mean(row, metric))
    ranked = []
    for row in compared:
        tied = tuple(other.method for other in compared if other is not row and _tied(row, other, metric, tested))
        ahead = [other for other in compared if sign * (_mean(other, metric) - _mean(row, metric)) > 0]
        better = [other for other in ahead if other.method not in tied]
        ranked.append(dataclasses.replace(row, rank=1 + len(better), tied_with=tied))
    # The sort is stable: methods of one rank stay in the order of their means.
    ranked.sort(key=lambda row: row.rank)
    return (*ranked, *(row for row in rows if row.status != "ok"))


def _mean(row: MethodResult, metric: Metric) -> float:
    mean = row.scores[metric.name].mean
    if mean is None:
        raise ValueError(f"{row.method} has status 'ok' and no {metric.title}")
    return mean


def _tied(a: MethodResult, b: MethodResult, metric: Metric, tested: int) -> bool:
    widest = max(_spread(row, metric, tested) for row in (a, b))
    return abs(_mean(a, metric) - _mean(b, metric)) <= widest


def _spread(row: MethodResult, metric: Metric, tested: int) -> float:
    spread = row.scores[metric.name].spread
    if spread is not None:
        return spread
    if metric.form != "percent":
        return metric.margin * abs(_mean(row, metric))
    share = min(max(_mean(row, metric), 0.0), 1.0)
    return math.sqrt(share * (1 - share) / max(tested, 1))
