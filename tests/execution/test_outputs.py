"""Differences between outputs, by hand."""

from typing import Any

import numpy as np
import pytest

from qcompiler.errors import ParityError
from qcompiler.execution.outputs import compare_outputs

Array = np.ndarray[Any, np.dtype[Any]]
A = np.array([1.0, -2.0, 4.0], np.float32)


def one(reference: Array, other: Array) -> tuple[float, float, float]:
    (found,) = compare_outputs({"y": reference}, {"y": other})
    assert found.name == "y"
    return found.max_abs, found.max_rel, found.sqnr_db


def test_measures_by_hand() -> None:
    max_abs, max_rel, sqnr = one(A, A + np.array([0, 0.2, 0], np.float32))
    assert max_abs == pytest.approx(0.2)
    assert max_rel == pytest.approx(0.05)
    assert sqnr == pytest.approx(10 * np.log10(21 / 0.04), abs=1e-4)


def test_equal_outputs() -> None:
    assert one(A, A) == (0.0, 0.0, np.inf)
    assert one(A[:0], A[:0]) == (0.0, 0.0, np.inf)


def test_zero_reference() -> None:
    assert one(0 * A, A) == (4.0, np.inf, -np.inf)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_on_one_side_is_infinitely_far(value: float) -> None:
    broken = np.array([1.0, value, 4.0], np.float32)
    assert one(A, broken)[0] == np.inf
    assert one(broken, A)[0] == np.inf


def test_equal_infinities_agree() -> None:
    masked = np.array([1.0, -np.inf, 4.0], np.float32)
    assert one(masked, masked) == (0.0, 0.0, np.inf)


def test_nan_at_the_same_place_agrees() -> None:
    masked = np.array([np.nan, -2.0, 4.0], np.float32)
    assert one(masked, masked) == (0.0, 0.0, np.inf)
    moved = np.array([1.0, np.nan, 4.0], np.float32)
    assert one(masked, moved) == (np.inf, np.inf, -np.inf)
    max_abs, max_rel, _ = one(masked, masked + np.float32(1))
    assert (max_abs, max_rel) == (1.0, 0.25)


def test_infinities_of_other_sign_differ() -> None:
    masked = np.array([1.0, -np.inf, 4.0], np.float32)
    assert one(masked, np.abs(masked))[0] == np.inf


def test_values_that_are_finite_no_more_are_counted() -> None:
    before = np.array([1.0, np.nan, np.inf, 4.0], np.float32)
    after = np.array([np.nan, 1.0, np.inf, np.inf], np.float32)
    (worse,) = compare_outputs({"y": before}, {"y": after})
    (better,) = compare_outputs({"y": before}, {"y": np.nan_to_num(before)})
    assert (worse.spoiled, better.spoiled) == (2, 0)


def test_integers_half_floats_and_strings() -> None:
    assert one(np.array([300], np.int32), np.array([299], np.int32))[0] == 1.0
    assert one(A.astype(np.float16), A)[0] == 0.0
    assert one(np.array(["a"], object), np.array(["a"], object))[0] == 0.0
    assert one(np.array(["a"], object), np.array(["b"], object))[0] == np.inf


def test_shapes_and_names_must_agree() -> None:
    with pytest.raises(ParityError, match=r"shapes \[3\] and \[2\]"):
        one(A, A[:2])
    with pytest.raises(ParityError, match="z exist on one side"):
        compare_outputs({"y": A}, {"y": A, "z": A})
