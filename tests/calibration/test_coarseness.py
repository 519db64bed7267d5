import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.calibration.coarseness import median_magnitude


def test_zeros_do_not_count() -> None:
    assert median_magnitude(np.array([0.0, 0.0, 0.0, -3.0, 5.0, 4.0])) == 4.0


@pytest.mark.parametrize("values", [[], [0.0, 0.0]])
def test_nothing_but_zeros_has_no_median(values: list[float]) -> None:
    array = np.array(values)
    assert median_magnitude(array) == np.inf
    assert median_magnitude(array, np.ones(len(values), np.int64)) == np.inf


@given(st.lists(st.tuples(st.floats(-9, 9, width=32), st.integers(1, 5)), min_size=1))
def test_counts_are_repetitions(pairs: list[tuple[float, int]]) -> None:
    values = np.array([value for value, _ in pairs])
    counts = np.array([count for _, count in pairs])
    repeated = np.sort(np.abs(np.repeat(values, counts)))
    repeated = repeated[repeated > 0]
    found = median_magnitude(values, counts)
    expected = repeated[(len(repeated) - 1) // 2] if repeated.size else np.inf
    assert found == expected
