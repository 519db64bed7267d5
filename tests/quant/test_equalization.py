"""Scales that move range from activations to weights."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.quant.equalization import (
    LARGEST_SCALE,
    balanced_scales,
    guarded,
    powers_of_two,
    salience_scales,
)

F64 = npt.NDArray[np.float64]
RANGES = st.lists(st.floats(0.05, 20.0), min_size=2, max_size=12)


@given(st.data())
def test_the_closed_form_reaches_the_least_product_of_ranges(data: st.DataObject) -> None:
    activation = np.array(data.draw(RANGES))
    count = len(activation)
    weight = np.array(data.draw(st.lists(st.floats(0.05, 20.0), min_size=count, max_size=count)))
    scales = balanced_scales(activation, weight)
    bound = float((activation * weight).max())
    assert _product(activation, weight, scales) == pytest.approx(bound, rel=1e-12)
    others = np.array(data.draw(st.lists(st.floats(0.1, 10.0), min_size=count, max_size=count)))
    assert _product(activation, weight, others) >= bound * (1 - 1e-12)


def test_both_sides_get_the_same_range_up_to_one_factor() -> None:
    activation, weight = np.array([8.0, 1.0, 0.5]), np.array([0.5, 2.0, 4.0])
    scales = balanced_scales(activation, weight)
    ratio = (activation / scales) / (weight * scales)
    assert ratio == pytest.approx(np.full(3, ratio[0]), rel=1e-12)


def test_with_symmetric_ranges_it_is_smoothquant_with_alpha_one_half() -> None:
    generator = np.random.default_rng(0)
    data, matrix = generator.normal(size=(50, 8)), generator.normal(size=(8, 5))
    size, weight = np.abs(data).max(axis=0), np.abs(matrix).max(axis=1)
    found = balanced_scales(2 * size, 2 * weight)
    smoothquant = np.sqrt(size) / np.sqrt(weight)
    smoothquant /= np.exp(np.log(smoothquant).mean())
    assert found == pytest.approx(smoothquant, rel=1e-12)


def test_alpha_says_how_much_goes_to_the_weights() -> None:
    activation, weight = np.array([100.0, 1.0]), np.array([1.0, 1.0])
    spreads = [np.ptp(np.log(balanced_scales(activation, weight, a))) for a in (0.0, 0.5, 1.0)]
    assert spreads == pytest.approx([0.0, np.log(10), np.log(100)])


def test_channels_without_a_range_keep_theirs() -> None:
    scales = balanced_scales(np.array([0.0, 4.0, 9.0, np.inf]), np.array([1.0, 0.0, 4.0, 1.0]))
    assert scales == pytest.approx([1.0, 1.0, 1.0, 1.0])
    assert salience_scales(np.array([0.0, 4.0, 1.0]), 0.5) == pytest.approx([1.0, 2**0.5, 2**-0.5])
    assert balanced_scales(np.zeros(3), np.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def test_scales_have_no_common_factor_and_bounds() -> None:
    scales = guarded(np.array([1e-9, 1.0, 1e9, 1.0]), np.ones(4, np.bool_))
    assert scales.tolist() == [1 / LARGEST_SCALE, 1.0, LARGEST_SCALE, 1.0]
    assert guarded(np.array([5.0, 5.0]), np.ones(2, np.bool_)) == pytest.approx([1.0, 1.0])


def test_powers_of_two_are_the_nearest() -> None:
    assert powers_of_two(np.array([0.3, 1.0, 1.5, 2.7, 3.0])).tolist() == [0.25, 1.0, 2.0, 2.0, 4.0]


def _product(activation: F64, weight: F64, scales: F64) -> float:
    return float((activation / scales).max() * (weight * scales).max())
