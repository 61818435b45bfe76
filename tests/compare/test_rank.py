"""Mean, spread, ties and rank."""

import pytest

from heed.compare.rank import rank, score_over_seeds
from heed.compare.results import MethodResult, Metric

ACCURACY = Metric("accuracy", "accuracy")
BITS = Metric("bits", "bits per byte", "lower", "number")


def row(method, *per_seed, status="ok", metric=ACCURACY):
    scores = {metric.name: score_over_seeds(per_seed)}
    return MethodResult(method, status, scores, error=None if status == "ok" else "broke")


def test_spread_is_the_sample_standard_deviation():
    found = score_over_seeds([0.9, 0.8, 1.0])
    assert found.mean == pytest.approx(0.9)
    assert found.spread == pytest.approx(0.1)
    assert found.per_seed == (0.9, 0.8, 1.0)


def test_seeds_that_failed_are_left_out_of_the_mean_and_stay_visible():
    found = score_over_seeds([0.9, None, 0.8])
    assert found.mean == pytest.approx(0.85)
    assert found.per_seed == (0.9, None, 0.8)
    assert score_over_seeds([None]).mean is None
    assert score_over_seeds([0.7]).spread is None


def test_a_difference_beyond_the_spread_is_a_rank():
    first, second = rank([row("low", 0.80, 0.81), row("high", 0.95, 0.96)], ACCURACY, 1000)
    assert (first.method, first.rank, first.tied_with) == ("high", 1, ())
    assert (second.method, second.rank, second.tied_with) == ("low", 2, ())


def test_a_difference_within_the_larger_spread_is_a_tie():
    first, second = rank([row("steady", 0.90, 0.90), row("wild", 0.85, 0.99)], ACCURACY, 1000)
    assert (first.method, first.rank, first.tied_with) == ("wild", 1, ("steady",))
    assert (second.method, second.rank, second.tied_with) == ("steady", 1, ("wild",))


def test_ties_do_not_carry_over():
    rows = rank([row("a", 0.90, 0.92), row("b", 0.89, 0.91), row("c", 0.88, 0.90)], ACCURACY, 1000)
    assert [(r.method, r.rank, r.tied_with) for r in rows] == [("a", 1, ("b",)), ("b", 1, ("a", "c")), ("c", 2, ("b",))]


def test_one_seed_is_judged_by_the_size_of_the_test_set():
    few = rank([row("a", 0.90), row("b", 0.88)], ACCURACY, 100)
    many = rank([row("a", 0.90), row("b", 0.88)], ACCURACY, 10_000)
    assert [r.rank for r in few] == [1, 1]
    assert [r.rank for r in many] == [1, 2]


def test_failed_methods_come_last_without_a_rank():
    rows = rank([row("broken", None, 0.99, status="failed"), row("fine", 0.5, 0.6)], ACCURACY, 100)
    assert [(r.method, r.rank) for r in rows] == [("fine", 1), ("broken", None)]
    assert rows[0].tied_with == ()


def test_where_lower_is_better_the_lowest_comes_first():
    rows = [row("a", 2.0, 2.1, metric=BITS), row("b", 1.0, 1.1, metric=BITS), row("c", 1.02, 1.12, metric=BITS)]
    assert [(r.method, r.rank, r.tied_with) for r in rank(rows, BITS, 10)] == [
        ("b", 1, ("c",)),
        ("c", 1, ("b",)),
        ("a", 3, ()),
    ]


def test_scores_that_are_no_shares_tie_with_one_seed_only_when_equal():
    rows = [row("a", 1.0, metric=BITS), row("b", 1.0, metric=BITS), row("c", 1.001, metric=BITS)]
    assert [r.rank for r in rank(rows, BITS, 10)] == [1, 1, 3]


def test_scores_that_are_no_shares_tie_within_a_margin():
    loss = Metric("loss", "loss", "lower", "number", margin=0.01)
    rows = [row(name, value, metric=loss) for name, value in (("a", 2.0), ("b", 2.015), ("c", 2.1))]
    ranked = {found.method: (found.rank, found.tied_with) for found in rank(rows, loss, 10)}
    assert ranked == {"a": (1, ("b",)), "b": (1, ("a",)), "c": (3, ())}
