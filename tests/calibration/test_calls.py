"""Fingerprints of calls, and warnings about inputs that cannot calibrate anything."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcompiler.calibration.calls import Feeds, Samples, call_digest, warnings

A = np.arange(6, dtype=np.float32).reshape(2, 3)


def _samples(*calls: Feeds) -> Samples:
    return Samples("test", False, len(calls), lambda: iter(calls))


def test_warnings_and_fingerprint_read_the_data_once() -> None:
    readings = 0

    def read() -> Iterator[Feeds]:
        nonlocal readings
        readings += 1
        yield {"x": A}

    samples = Samples("test", False, 1, read)
    assert warnings(samples) == ()
    assert samples.fingerprint() == samples.fingerprint()
    assert readings == 1


@pytest.mark.parametrize(
    "other",
    [
        {"y": A},
        {"x": A.reshape(3, 2)},
        {"x": A.astype(np.float64)},
        {"x": A + 1},
        {"x": A, "y": A},
        {"x": A.view(np.int32)},
        {},
    ],
)
def test_whatever_differs_changes_the_digest(other: dict[str, Any]) -> None:
    assert call_digest(other) != call_digest({"x": A})


def test_the_digest_is_of_values_not_of_memory() -> None:
    assert call_digest({"x": np.asfortranarray(A)}) == call_digest({"x": A})
    wide = np.array(["a", "longer"])[:1]
    assert call_digest({"s": wide}) == call_digest({"s": np.array(["a"])})
    assert call_digest({"s": np.array(["a", "b"])}) != call_digest({"s": np.array(["ab", ""])})


def test_scalars_empty_arrays_and_bfloat16_have_digests() -> None:
    digests = {
        call_digest({"x": np.zeros((), np.float32)}),
        call_digest({"x": np.zeros((0, 3), np.float32)}),
        call_digest({"x": np.zeros((3, 0), np.float32)}),
        call_digest({"x": np.zeros((1,), ml_dtypes.bfloat16)}),
        call_digest({"x": np.zeros((1,), np.float16)}),
    }
    assert len(digests) == 5


def test_order_and_division_into_calls_change_the_fingerprint() -> None:
    one, two = {"x": A}, {"x": A + 1}
    prints = {s.fingerprint() for s in (_samples(one, two), _samples(two, one), _samples(one))}
    assert len(prints) == 3


def test_a_float_input_that_never_varies_warns() -> None:
    (text,) = warnings(_samples({"x": np.full((2, 3), 0.5, np.float32)}, {"x": A[:0] + 0.5}))
    assert text == ("input x is 0.5 everywhere in 2 calls: no range can be calibrated on it")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_float_type_warns(dtype: Any) -> None:
    assert len(warnings(_samples({"x": np.zeros((2, 3), dtype)}))) == 1


def test_inputs_constant_within_but_not_between_calls_do_not_warn() -> None:
    assert warnings(_samples({"x": np.zeros((2, 3), np.float32)}, {"x": A * 0 + 1})) == ()


def test_masks_scalars_and_empty_caches_do_not_warn() -> None:
    call: Feeds = {
        "attention_mask": np.ones((2, 3), np.int64),
        "rate": np.array(16000.0, np.float32),
        "past": np.zeros((1, 4, 0, 8), np.float32),
        "flag": np.zeros(3, np.bool_),
    }
    assert warnings(_samples(call, call)) == ()


def test_nan_warns() -> None:
    (text,) = warnings(_samples({"x": A}, {"x": A * np.float32("nan")}))
    assert text == "input x holds NaN in 1 of 2 calls"
