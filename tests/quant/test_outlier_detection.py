"""Outliers that were planted are found, and what belongs together stays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.quant.equalization import outlier_scales
from qcompiler.quant.outlier_detection import ordinary_limit, row_limits


def _sizes(count: int = 98, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.abs(np.random.default_rng(seed).uniform(0.5, 1.0, count))


@pytest.mark.parametrize("planted", [[50.0], [50.0, 50.0], [10.0, 40.0, 45.0], [3.0, 100.0]])
def test_planted_outliers_are_found_exactly(planted: list[float]) -> None:
    for seed in range(20):
        ordinary = _sizes(seed=seed)
        mixed = np.random.default_rng(seed).permutation([*ordinary, *planted])
        limit = ordinary_limit(mixed)
        found = sorted(mixed[mixed > limit])
        # The fine step may leave the smallest of very unequal ones to the ordinary sizes.
        assert found == planted[-len(found) :]
        assert found[-1] == planted[-1]
        if max(planted) < 2 * min(planted):
            assert found == planted
            assert limit == ordinary.max()


def test_even_sizes_have_no_outliers() -> None:
    assert ordinary_limit(_sizes()) == np.inf
    assert ordinary_limit(np.ones(10)) == np.inf
    assert ordinary_limit(np.zeros(10)) == np.inf
    assert ordinary_limit(np.array([3.0])) == np.inf


def test_the_worked_example() -> None:
    assert ordinary_limit(np.array([*np.linspace(0, 1, 98), 50, 50])) == 1.0


def test_rows_are_judged_each_by_itself() -> None:
    matrix = np.stack([_sizes(100), -_sizes(100, 1), _sizes(100, 2)])
    matrix[1, 7] = -30
    limits = row_limits(matrix)
    assert limits[0] == limits[2] == np.inf
    assert limits[1] == np.sort(np.abs(matrix[1]))[-2]
    many = np.tile(matrix, (200, 1))
    np.testing.assert_array_equal(row_limits(many), np.tile(limits, 200))


@given(
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=60),
    st.floats(0.01, 100),
)
def test_the_limit_is_one_of_the_sizes_and_has_their_unit(sizes: list[float], unit: float) -> None:
    values = np.array(sizes)
    limit = ordinary_limit(values)
    assert limit == np.inf or limit in values
    assert limit == np.inf or np.mean(values > limit) <= 0.25
    power = 2.0 ** np.rint(np.log2(unit))
    assert ordinary_limit(values * power) == limit * power


def test_scales_touch_outliers_alone() -> None:
    sizes = _sizes()
    sizes[[3, 50]] = 40.0, 60.0
    scales = outlier_scales(sizes, 0.5)
    others = np.delete(sizes, [3, 50])
    assert np.all(np.delete(scales, [3, 50]) == 1)
    assert scales[[3, 50]] == pytest.approx(np.sqrt(np.array([40.0, 60.0]) / others.max()))
    assert np.all(outlier_scales(np.zeros(8), 0.5) == 1)
