import numpy as np
import pytest

from qcompiler.calibration.estimates import (
    Estimate,
    decibels_of,
    difference,
    exponential,
    ratio,
    share,
    student,
)

ONES = np.ones(200)


@pytest.mark.parametrize(
    ("freedom", "table"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (99, 1.984)],
)
def test_percentiles_of_students_distribution(freedom: int, table: float) -> None:
    assert student(freedom) == pytest.approx(table, rel=0.01)


def test_intervals_hold_the_truth_in_19_of_20_cases() -> None:
    rng = np.random.default_rng(0)
    means, shares = 0, 0
    for _ in range(400):
        sizes = rng.integers(1, 9, 40).astype(float)
        numbers = rng.standard_normal(40) * sizes + 3 * sizes
        found = ratio(numbers, sizes)
        assert found.low is not None
        assert found.high is not None
        means += found.low <= 3 <= found.high
        hits = (rng.random(40) < 0.9).astype(float)
        inside = share(hits, np.ones(40))
        assert inside.low is not None
        assert inside.high is not None
        shares += inside.low <= 0.9 <= inside.high
    assert 0.92 * 400 < means < 0.98 * 400
    assert 0.91 * 400 < shares < 0.99 * 400


def test_a_visible_difference_is_seen_in_4_of_5_cases() -> None:
    rng = np.random.default_rng(1)
    visible = ratio(rng.standard_normal(200), ONES).visible
    assert visible is not None
    seen = 0
    for _ in range(300):
        found = ratio(rng.standard_normal(200) + visible, ONES)
        assert found.low is not None
        seen += found.low > 0
    assert 0.65 * 300 < seen < 0.92 * 300


def test_rows_of_one_sample_count_as_one() -> None:
    rng = np.random.default_rng(2)
    hits = (rng.random(50) < 0.8).astype(float) * 100
    together = share(hits, np.full(50, 100.0))
    alone = share(np.repeat(hits / 100, 100), np.ones(5000))
    assert together.low is not None
    assert alone.low is not None
    assert together.value - together.low > 5 * (alone.value - alone.low)


def test_agreement_of_all_samples_leaves_doubt() -> None:
    found = share(ONES, ONES)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.981, abs=0.001)
    assert found.visible == pytest.approx(3 / 200, rel=0.01)  # the rule of three
    nothing = difference(ONES, ONES, ONES, shares=True)
    assert nothing.value == 0.0
    assert nothing.high == pytest.approx(3 / 200, rel=0.01)


def test_pairs_see_more_than_two_figures() -> None:
    rng = np.random.default_rng(3)
    first = (rng.random(500) < 0.8).astype(float)
    second = first.copy()
    second[np.flatnonzero(first)[:5]] = 0.0
    ones = np.ones(500)
    found = difference(first, second, ones, shares=True)
    apart = share(first, ones)
    assert found.value == pytest.approx(-0.01)
    assert found.visible is not None
    assert apart.visible is not None
    assert found.visible < apart.visible / 3


def test_decibels() -> None:
    rng = np.random.default_rng(4)
    noise = 0.01 * (1 + 0.1 * rng.standard_normal(100))
    found = decibels_of(np.ones(100), noise)
    assert found.value == pytest.approx(20, abs=0.2)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 20 < found.high
    assert found.high - found.low < 0.3
    assert decibels_of(ONES, 0 * ONES).value == np.inf
    assert decibels_of(ONES, np.full(200, np.inf)).value == -np.inf


def test_one_sample_has_no_interval() -> None:
    found = ratio(np.array([3.0]), np.array([2.0]))
    assert found == Estimate(1.5, samples=1)
    assert decibels_of(np.array([100.0]), np.array([1.0])) == Estimate(20.0, samples=1)


def test_a_falling_function_turns_the_ends() -> None:
    turned = Estimate(1.0, 0.5, 2.0, 0.1, 9).mapped(lambda x: -x)
    assert (turned.low, turned.high) == (-2.0, -0.5)
    assert exponential(Estimate(0.0, -1.0, 1.0, 0.1, 9)).low == pytest.approx(np.exp(-1))
