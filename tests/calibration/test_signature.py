"""Matching arrays to a model's inputs by name, type and shape."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.signature import Signature, read_signature
from qcompiler.errors import UsageError
from tests.support.graphs import build


def _signature(inputs: str, weights: dict[str, Any] | None = None) -> Signature:
    return read_signature(
        build(f"g ({inputs}) => (float y) {{ y = Constant<value_float=1.0>() }}", weights)
    )


def _refusal(signature: Signature, **arrays: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        signature.feeds(arrays, "place")
    assert caught.value.where == "place"
    return caught.value


def test_arrays_come_back_in_the_order_of_the_inputs() -> None:
    feeds = _signature("float[b, 4] x, int64[b] ids").feeds(
        {"ids": np.zeros(2, np.int64), "x": np.ones((2, 4), np.float32)}, ""
    )
    assert list(feeds) == ["x", "ids"]


def test_a_mismatch_lists_both_sides() -> None:
    error = _refusal(
        _signature("int64[batch, seq] input_ids, float[?, 3] x"),
        ids=np.zeros((2, 7), np.int32),
        x=np.zeros((1, 3), np.float32),
    )
    assert error.message == (
        "holds ids int32[2, 7], x float32[1, 3], "
        "and the model takes input_ids int64[batch, seq], x float32[?, 3]"
    )
    assert error.hint == "missing: input_ids; not in the model: ids"


@pytest.mark.parametrize(
    ("taken", "given"),
    [
        ("float", np.float64),
        ("float", np.float16),
        ("float", ml_dtypes.bfloat16),
        ("float", ">f4"),
        ("float16", np.float32),
        ("bfloat16", np.float32),
        ("double", np.float32),
        ("int64", np.int32),
        ("int64", np.uint8),
        ("int64", np.bool_),
        ("int64", ">i8"),
        ("int32", np.int16),
    ],
)
def test_types_that_lose_nothing_are_cast(taken: str, given: Any) -> None:
    signature = _signature(f"{taken}[n] x")
    x = signature.feeds({"x": np.array([0, 1], given)}, "")["x"]
    assert x.dtype == signature.inputs[0].dtype.numpy()
    assert x.astype(np.float64).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("taken", "given"),
    [
        ("float", np.int64),
        ("float", np.uint8),
        ("int64", np.float32),
        ("int64", np.uint64),
        ("int32", np.int64),
        ("uint8", np.int8),
        ("int8", np.uint8),
        ("bool", np.int64),
        ("float", np.complex64),
        ("float", "U1"),
    ],
)
def test_types_that_may_lose_something_are_refused(taken: str, given: Any) -> None:
    error = _refusal(_signature(f"{taken}[n] x"), x=np.zeros(2, given))
    assert error.hint
    assert error.hint.startswith(f"input x: {np.dtype(given)} does not become")
    assert error.message.startswith(f"holds x {np.dtype(given)}[2], and the model takes x ")


@pytest.mark.parametrize("taken", ["float", "float16"])
def test_values_that_do_not_fit_the_type_are_refused(taken: str) -> None:
    large = np.array([1.0, 1e300, -1e300, np.inf, np.nan])
    error = _refusal(_signature(f"{taken}[n] x"), x=large)
    assert error.message.startswith("2 values of input x are too large for float")


def test_infinity_stays_infinity() -> None:
    x = _signature("float[n] x").feeds({"x": np.array([-np.inf, np.nan])}, "")["x"]
    assert x[0] == -np.inf
    assert np.isnan(x[1])


def test_static_dimensions_must_agree() -> None:
    error = _refusal(_signature("float[b, 3, 4] x"), x=np.zeros((9, 3, 5), np.float32))
    assert error.hint == "input x: axis 2 is 5 where 4 is taken"
    assert "holds x float32[9, 3, 5]" in error.message


def test_the_number_of_dimensions_must_agree() -> None:
    error = _refusal(_signature("float[b, 3] x"), x=np.zeros(3, np.float32))
    assert error.hint == "input x: 1 dimensions where 2 are taken"


def test_a_shape_that_is_not_known_takes_all() -> None:
    model = build("g (float[1] x) => (float[1] y) { y = Relu(x) }")
    model.graph.inputs[0].shape = None
    signature = read_signature(model)
    assert str(signature) == "x float32 of any shape"
    assert signature.feeds({"x": np.zeros((2, 3), np.float32)}, "")["x"].shape == (2, 3)


def test_inputs_with_a_default_may_be_left_out() -> None:
    signature = _signature("float[2] x, float[2] scale", {"scale": np.ones(2, np.float32)})
    assert str(signature) == "x float32[2], scale float32[2] (optional)"
    assert list(signature.feeds({"x": np.zeros(2, np.float32)}, "")) == ["x"]
    both = {"scale": np.zeros(2, np.float32), "x": np.zeros(2, np.float32)}
    assert list(signature.feeds(both, "")) == ["x", "scale"]
    assert signature.only_name("place") == "x"


def test_data_without_a_name_needs_one_input() -> None:
    with pytest.raises(UsageError, match=r"one array without a name, and the model takes a f.*, b"):
        _signature("float[2] a, float[2] b").only_name("place")


def test_texts_are_taken_for_string_inputs_only() -> None:
    signature = _signature("string[n] s")
    assert signature.feeds({"s": np.array(["a", "bc"])}, "")["s"].tolist() == ["a", "bc"]
    assert _refusal(signature, s=np.zeros(2)).hint == "input s: float64 where text is taken"


def test_a_sequence_is_no_tensor() -> None:
    model = build("g (float[1] x) => (float[1] y) { y = Relu(x) }")
    model.graph.inputs[0].type = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
    with pytest.raises(UsageError, match="input x: is no tensor"):
        read_signature(model)


def test_long_lists_and_odd_names_stay_readable() -> None:
    arrays = {f"a{index}": np.zeros(1) for index in range(40)}
    error = _refusal(_signature("float[1] x"), **arrays, **{"evil\x1b[2J": np.zeros(1)})
    assert "and 29 more" in error.message
    error = _refusal(_signature("float[1] x"), **{"evil\x1b[2J": np.zeros(1)})
    assert "\x1b" not in str(error)
