"""Which channels stay in float."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.calibration.histogram import Histogram
from qcompiler.calibration.outliers import outlier_channels

Array = npt.NDArray[Any]


def channels(count: int, large: dict[int, float]) -> tuple[Array, Array]:
    """Return the extremes of channels in -1..1, but for some."""
    high = np.ones(count)
    for index, value in large.items():
        high[index] = value
    return -high, high


@pytest.mark.parametrize(
    ("large", "limit", "expected"),
    [
        ({}, 8, ()),
        ({9: 60.0}, 8, (9,)),
        ({9: 60.0}, 0, ()),
        ({9: 60.0, 3: 50.0}, 8, (3, 9)),
        ({9: 60.0, 3: 50.0}, 1, ()),
        ({9: 600.0, 3: 50.0}, 1, (9,)),
        ({9: 1.5}, 8, ()),
        ({9: 1.7}, 8, ()),
        ({9: 1.8}, 8, (9,)),
        ({9: 60.0, 3: 1.1}, 8, (9,)),
    ],
)
def test_chooses_what_gains_most(
    large: dict[int, float], limit: int, expected: tuple[int, ...]
) -> None:
    # One channel gains 20 log10(its size) dB, of which 1 is its price and 4 the least gain.
    assert outlier_channels(*channels(128, large), limit) == expected


def test_at_most_one_channel_in_sixteen() -> None:
    large = dict.fromkeys(range(5), 1000.0)
    assert outlier_channels(*channels(64, large), 8) == ()
    assert outlier_channels(*channels(80, large), 8) == (0, 1, 2, 3, 4)
    assert outlier_channels(*channels(15, {0: 1e6}), 8) == ()


def test_one_side_is_enough_and_zero_is_in_every_range() -> None:
    low, high = np.zeros(32), np.full(32, 1.0)
    low[7] = -40
    assert outlier_channels(low, high, 4) == (7,)
    assert outlier_channels(np.full(32, 5.0), np.full(32, 6.0), 4) == ()


def test_a_tensor_of_zeros_but_for_one_channel() -> None:
    low, high = np.zeros(32), np.zeros(32)
    assert outlier_channels(low, high, 4) == ()
    high[3] = 1.0
    assert outlier_channels(low, high, 4) == ()


@given(
    values=st.lists(st.floats(0, 1e6), min_size=1, max_size=64),
    limit=st.integers(0, 10),
    factor=st.sampled_from([0.25, 4.0]),
)
def test_properties(values: list[float], limit: int, factor: float) -> None:
    high = np.array(values)
    found = outlier_channels(-high, high, limit)
    assert list(found) == sorted(set(found))
    assert len(found) <= min(limit, len(values) // 16)
    rest = np.delete(high, found)
    assert all(high[channel] >= rest.max(initial=0) for channel in found)
    assert outlier_channels(-high * factor, high * factor, limit) == found


VALUES = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.5, 2.0), (-9.0, 9.0), (0.25, 0.5)])
def test_histogram_within_a_range(low: float, high: float) -> None:
    whole = Histogram.from_array(VALUES)
    part = whole.within(low, high)
    truth = VALUES[(low <= VALUES) & (high >= VALUES)]
    # Bins that the ends cut are kept whole: 1/128 of a power of two each.
    assert len(truth) <= part.count <= len(truth) + 400
    assert part.minimum == max(whole.minimum, low)
    assert part.maximum == min(whole.maximum, high)
    assert part.is_ordered
    lower, upper = part.edges
    assert lower.min() >= low
    assert upper.max() <= high
    assert whole.within(whole.minimum, whole.maximum).count == whole.count
