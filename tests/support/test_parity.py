"""The parity checker itself: it passes equal models and fails on broken ones."""

import numpy as np
import pytest

from tests.support.graphs import build
from tests.support.parity import assert_parity, random_feeds, run_model

_TEXT = "g (float[N,3] x) => (float[N,2] y) { y = MatMul(x, w) }"
_WEIGHT = np.arange(6, dtype=np.float32).reshape(3, 2)


def test_equal_models_have_equal_bits() -> None:
    assert_parity(build(_TEXT, {"w": _WEIGHT}), build(_TEXT, {"w": _WEIGHT}), tolerance=0)


def test_a_broken_model_fails_and_the_message_has_the_numbers() -> None:
    broken = _WEIGHT.copy()
    broken[0, 0] += 1
    with pytest.raises(AssertionError, match=r"seed 3:\ny: max abs .*, max rel .*, SQNR .* dB"):
        assert_parity(
            build(_TEXT, {"w": _WEIGHT}), build(_TEXT, {"w": broken}), tolerance=1e-3, seed=3
        )


def test_tolerance_zero_asks_for_equal_bits() -> None:
    negative_zero = build(
        "g (float[2] x) => (float[2] y) { y = Mul(x, w) }", {"w": -np.zeros(1, np.float32)}
    )
    positive_zero = build(
        "g (float[2] x) => (float[2] y) { y = Mul(x, w) }", {"w": np.zeros(1, np.float32)}
    )
    assert_parity(negative_zero, positive_zero, tolerance=1e-9)
    with pytest.raises(AssertionError, match="tolerance 0"):
        assert_parity(negative_zero, positive_zero, tolerance=0)


def test_nan_in_one_output_only_fails() -> None:
    with pytest.raises(AssertionError, match="nan"):
        assert_parity(
            build(_TEXT, {"w": _WEIGHT}), build(_TEXT, {"w": _WEIGHT * np.nan}), tolerance=1.0
        )


def test_another_shape_fails() -> None:
    other = build("g (float[N,3] x) => (float[N,1] y) { y = MatMul(x, w) }", {"w": _WEIGHT[:, :1]})
    with pytest.raises(AssertionError, match="max abs inf"):
        assert_parity(build(_TEXT, {"w": _WEIGHT}), other, tolerance=1.0)


def test_feeds_follow_seed_and_dimensions() -> None:
    model = build(_TEXT, {"w": _WEIGHT})
    first, again = random_feeds(model, 1, {"N": 5}), random_feeds(model, 1, {"N": 5})
    assert first["x"].shape == (5, 3)
    assert np.array_equal(first["x"], again["x"])
    assert not np.array_equal(first["x"], random_feeds(model, 2, {"N": 5})["x"])
    assert run_model(model, first)["y"].shape == (5, 2)
