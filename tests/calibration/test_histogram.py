"""Histograms by the upper half of the float32 pattern."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.calibration.histogram import CHUNK, Histogram, HistogramBuilder

Array = npt.NDArray[Any]
FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3, max_side=40),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def assert_same(one: Histogram, other: Histogram) -> None:
    np.testing.assert_array_equal(one.bins, other.bins)
    np.testing.assert_array_equal(one.counts, other.counts)
    assert (one.minimum, one.maximum) == (other.minimum, other.maximum)
    assert one.exact == other.exact


@given(FLOATS)
def test_counts_what_numpy_counts(values: Array) -> None:
    histogram = Histogram.from_array(values)
    assert histogram.count == values.size
    assert histogram.minimum == values.min()
    assert histogram.maximum == values.max()
    assert histogram.is_ordered
    lower, upper = histogram.edges
    assert (np.diff(histogram.centers) > 0).all() or len(lower) == 1
    assert (lower <= upper).all()
    # Every value lies in a bin that is there, and none in a gap between bins.
    tiny = 2.0**-133
    flat = np.sort(np.where(np.abs(values) < tiny, 0, values).ravel().astype(np.float64))
    counted = np.repeat(np.arange(len(lower)), histogram.counts)
    assert (flat >= lower[counted] - tiny).all()
    assert (flat <= upper[counted] + tiny).all()


@given(FLOATS)
def test_a_center_is_within_one_part_in_128(values: Array) -> None:
    histogram = Histogram.from_array(values)
    flat = np.sort(values.ravel().astype(np.float64))
    centers = np.repeat(histogram.centers, histogram.counts)
    assert (np.abs(centers - flat) <= np.abs(flat) / 128 + 2.0**-133).all()


@given(FLOATS, FLOATS, st.randoms(use_true_random=False))
def test_order_and_division_do_not_matter(one: Array, other: Array, random: Any) -> None:
    both = np.concatenate([one.ravel(), other.ravel()])
    shuffled = both.tolist()
    random.shuffle(shuffled)
    whole = Histogram.from_array(both)
    assert_same(whole, Histogram.from_array(np.array(shuffled, np.float32)))
    first, second = Histogram.from_array(one), Histogram.from_array(other)
    assert_same(whole, first.merge(second))
    assert_same(whole, second.merge(first))


def test_chunks_add_up() -> None:
    values = np.random.default_rng(0).standard_normal(2 * CHUNK + 77).astype(np.float32)
    builder = HistogramBuilder()
    for part in np.split(values, [1, 5, 1000, CHUNK + 3]):
        builder.add(part)
    assert_same(builder.finish(), Histogram.from_array(values))


def test_nothing_merges_with_anything() -> None:
    none = Histogram.from_array(np.zeros((0, 3), np.float32))
    some = Histogram.from_array(f32(1.5, -2))
    assert (none.count, none.minimum, none.maximum) == (0, 0.0, 0.0)
    assert_same(none.merge(some), some)
    assert_same(some.merge(none), some)


def test_zeros_of_both_signs_share_a_bin() -> None:
    histogram = Histogram.from_array(f32(0.0, -0.0, -1.0))
    assert histogram.counts.tolist() == [1, 2]
    assert histogram.centers.tolist() == [-1.0, 0.0]
    assert not np.signbit(histogram.maximum)


def test_bfloat16_numbers_are_points() -> None:
    values = f32(1.0, 1.5, -2.0, 3.0e38).astype(ml_dtypes.bfloat16)
    histogram = Histogram.from_array(values)
    assert histogram.exact
    np.testing.assert_array_equal(histogram.centers, np.sort(values.astype(np.float64)))
    assert not Histogram.from_array(f32(1.001)).exact


def test_the_largest_number_has_a_finite_bin() -> None:
    largest = float(np.finfo(np.float32).max)
    histogram = Histogram.from_array(f32(largest, -largest, 1.001))
    assert histogram.edges[1].max() == largest
    assert histogram.edges[0].min() == -largest


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_widths_count_as_float32(dtype: npt.DTypeLike) -> None:
    values = np.random.default_rng(1).standard_normal(1000).astype(dtype)
    assert_same(Histogram.from_array(values), Histogram.from_array(values.astype(np.float32)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="2 values are NaN or infinite"):
        Histogram.from_array(f32(1, bad, bad, 2))


def test_a_float64_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="1 values are NaN or infinite"):
        Histogram.from_array(np.array([1e300]))


def test_other_orders_in_memory_are_read() -> None:
    values = np.random.default_rng(2).standard_normal((30, 40)).astype(np.float32)
    assert_same(Histogram.from_array(values.T[::2]), Histogram.from_array(values.T[::2].copy()))
