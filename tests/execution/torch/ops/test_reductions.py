from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.support.graphs import random_array
from tests.support.torch_programs import (
    agrees_with_runtime,
    gradients_agree,
    program_of,
    run_program,
)

_REDUCTIONS = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]


def _positive(*shape: int, dtype: Any = np.float64) -> Any:
    """Different values, none of them near zero."""
    count = int(np.prod(shape))
    values = np.random.default_rng(0).permutation(np.linspace(0.3, 1.9, count))
    return values.reshape(shape).astype(dtype)


@pytest.mark.parametrize("op", _REDUCTIONS)
@pytest.mark.parametrize("axes", [[1], [0, -1], []])
@pytest.mark.parametrize("attributes", ["keepdims=0", "keepdims=1, noop_with_empty_axes=1"])
def test_gradients(op: str, axes: list[int], attributes: str) -> None:
    text = f"g (double[2, 3, 4] x) => (double[N] y) {{ y = {op}<{attributes}>(x, axes) }}"
    gradients_agree(text, {"x": _positive(2, 3, 4)}, {"axes": np.array(axes, np.int64)})


def test_gradient_of_a_norm_is_zero_at_zero() -> None:
    # A root of a sum of squares has the gradient NaN there.
    text = "g (double[2, 3] x) => (double[2] y) { y = ReduceL2<keepdims=0>(x, axes) }"
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.backward(program_of(text, {"axes": np.array([1])})({"x": x})["y"].sum())
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("op", _REDUCTIONS)
@pytest.mark.parametrize("attributes", ["keepdims=1", "axes=[1]", "axes=[0, -1], keepdims=0"])
@pytest.mark.parametrize("opset", [10, 12])
def test_axes_as_attribute(op: str, attributes: str, opset: int) -> None:
    text = f"g (float[A, B, C] x) => (float[N] y) {{ y = {op}<{attributes}>(x) }}"
    feeds = {"x": _positive(2, 3, 4, dtype=np.float32)}
    agrees_with_runtime(_dims(text, attributes), feeds, tolerance=3e-6, opset=opset)


@pytest.mark.parametrize("op", _REDUCTIONS)
@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize("noop", [0, 1])
def test_no_axes(op: str, opset: int, noop: int) -> None:
    text = f"g (float[A, B] x) => (float[M, N] y) {{ y = {op}<noop_with_empty_axes={noop}>(x) }}"
    x = _positive(2, 3, dtype=np.float32)
    y = run_program(text, {"x": x}, opset=opset)["y"]
    assert y.shape == ((2, 3) if noop else (1, 1))
    if noop:
        alone = {"ReduceLogSum": np.log(x), "ReduceSumSquare": x * x}
        np.testing.assert_allclose(y, alone.get(op, x), rtol=1e-6)
    else:
        agrees_with_runtime(text, {"x": x}, tolerance=3e-6, opset=opset)


@pytest.mark.parametrize("opset", [11, 13])
def test_reduce_sum_takes_its_axes_as_input_from_opset_13(opset: int) -> None:
    as_attribute = "y = ReduceSum<axes=[1], keepdims=0>(x)"
    as_input = "y = ReduceSum<keepdims=0>(x, axes)"
    node = as_input if opset == 13 else as_attribute
    text = (
        f"g (float[A, B] x, int64[1] axes) => (float[A] y, int64[1] z) {{ {node} z = Abs(axes) }}"
    )
    feeds = {"x": random_array(3, 4), "axes": np.array([1])}
    agrees_with_runtime(text, feeds, tolerance=1e-6, opset=opset)


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean", "ReduceProd"])
@pytest.mark.parametrize("type_", ["int32", "int64"])
def test_integers_stay_integers(op: str, type_: str) -> None:
    text = f"g ({type_}[A, B] x) => ({type_}[A, 1] y) {{ y = {op}(x, axes) }}"
    x = np.array([[-7, 2, 3], [1, 1, 2]], type_)
    # What ReduceMean does with a remainder is the truncation of C.
    y = run_program(text, {"x": x}, {"axes": np.array([1])})["y"]
    rows = {
        "ReduceMax": [3, 2], "ReduceMin": [-7, 1], "ReduceSum": [-2, 4], "ReduceMean": [0, 1],
        "ReduceProd": [-42, 2],
    }  # fmt: skip
    assert y.dtype == x.dtype
    assert y[:, 0].tolist() == rows[op]


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
def test_booleans(op: str) -> None:
    text = f"g (bool[A, B] x) => (bool[A] y) {{ y = {op}<keepdims=0>(x, axes) }}"
    x = np.array([[True, False], [True, True], [False, False]])
    agrees_with_runtime(text, {"x": x}, {"axes": np.array([1])}, tolerance=0)


@pytest.mark.parametrize(
    ("op", "of_nothing"),
    [
        ("ReduceMax", -np.inf), ("ReduceMin", np.inf), ("ReduceSum", 0), ("ReduceProd", 1),
        ("ReduceLogSum", -np.inf), ("ReduceLogSumExp", -np.inf), ("ReduceL1", 0), ("ReduceL2", 0),
        ("ReduceSumSquare", 0),
    ],
)  # fmt: skip
def test_empty_sets_of_values(op: str, of_nothing: float) -> None:
    text = f"g (float[A, B] x) => (float[A, 1] y) {{ y = {op}(x, axes) }}"
    y = run_program(text, {"x": np.zeros((2, 0), np.float32)}, {"axes": np.array([1])})["y"]
    np.testing.assert_array_equal(y, np.full((2, 1), of_nothing, np.float32))


def test_extremes_of_no_integers_are_their_bounds() -> None:
    text = (
        "g (int8[A, B] x) => (int8[B] y, int8[B] z)"
        " { y = ReduceMax<keepdims=0>(x, axes) z = ReduceMin<keepdims=0>(x, axes) }"
    )
    results = run_program(text, {"x": np.zeros((0, 2), np.int8)}, {"axes": np.array([0])})
    assert (results["y"].tolist(), results["z"].tolist()) == ([-128] * 2, [127] * 2)


@pytest.mark.parametrize("type_", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum", "ReduceL2", "ReduceLogSumExp"])
def test_halves_are_summed_as_floats(op: str, type_: str) -> None:
    dtype = ir.DataType[type_.upper()].numpy()
    text = f"g ({type_}[N] x) => ({type_}[1] y) {{ y = {op}(x) }}"
    # In 16 bits, a sum of this many ones would stop at 2048 or 256.
    y = run_program(text, {"x": np.ones(4096, dtype)})["y"]
    exact = {
        "ReduceMean": 1,
        "ReduceSum": 4096,
        "ReduceL2": 64,
        "ReduceLogSumExp": 1 + np.log(4096),
    }
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(np.float32), exact[op], rtol=2.0**-8)


@pytest.mark.parametrize("op", _REDUCTIONS)
def test_one_number(op: str) -> None:
    text = f"g (float x) => (float y) {{ y = {op}<keepdims=0>(x) }}"
    agrees_with_runtime(text, {"x": np.array(2.5, np.float32)}, tolerance=1e-6)


class TestPositions:
    @pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
    @pytest.mark.parametrize("attributes", ["", "axis=1", "axis=-1, keepdims=0"])
    @pytest.mark.parametrize("last", [0, 1])
    def test_of_equals_the_first_or_last(self, op: str, attributes: str, last: int) -> None:
        both = ", ".join(filter(None, [attributes, f"select_last_index={last}"]))
        dims = "M" if "keepdims" in attributes else "M, N"
        text = f"g (int32[A, B] x) => (int64[{dims}] y) {{ y = {op}<{both}>(x) }}"
        x = np.random.default_rng(0).integers(0, 3, (5, 7)).astype(np.int32)
        agrees_with_runtime(text, {"x": x}, tolerance=0)

    def test_before_opset_12(self) -> None:
        text = "g (float[A, B] x) => (int64[A, 1] y) { y = ArgMax<axis=1>(x) }"
        agrees_with_runtime(text, {"x": random_array(3, 4)}, tolerance=0, opset=10)


class TestRunning:
    @pytest.mark.parametrize("exclusive", [0, 1])
    @pytest.mark.parametrize("reverse", [0, 1])
    @pytest.mark.parametrize("op", ["CumSum", "CumProd"])
    def test_gradients(self, op: str, exclusive: int, reverse: int) -> None:
        text = (
            "g (double[3, 4] x) => (double[3, 4] y)"
            f" {{ y = {op}<exclusive={exclusive}, reverse={reverse}>(x, axis) }}"
        )
        gradients_agree(text, {"x": _positive(3, 4)}, {"axis": np.array(-1)}, opset=26)

    @pytest.mark.parametrize("exclusive", [0, 1])
    @pytest.mark.parametrize("reverse", [0, 1])
    @pytest.mark.parametrize("type_", ["int32", "float"])
    def test_sums(self, exclusive: int, reverse: int, type_: str) -> None:
        text = (
            f"g ({type_}[A, B] x, int64[1] axis) => ({type_}[A, B] y)"
            f" {{ y = CumSum<exclusive={exclusive}, reverse={reverse}>(x, axis) }}"
        )
        x = np.arange(12).reshape(3, 4).astype(np.float32 if type_ == "float" else np.int32)
        agrees_with_runtime(text, {"x": x, "axis": np.array([0])}, tolerance=0)

    def test_an_exclusive_sum_leaves_infinities_out(self) -> None:
        text = "g (float[3] x) => (float[3] y) { y = CumSum<exclusive=1>(x, axis) }"
        x = np.array([1, np.inf, 1], np.float32)
        y = run_program(text, {"x": x}, {"axis": np.array(0)})["y"]
        assert y.tolist() == [0, 1, np.inf]


def test_gradient_of_det() -> None:
    text = "g (double[2, 3, 3] x) => (double[2] y) { y = Det(x) }"
    gradients_agree(text, {"x": random_array(2, 3, 3, dtype=np.float64)})


def test_det_of_halves() -> None:
    text = "g (float16[2, 2] x) => (float16 y) { y = Det(x) }"
    y = run_program(text, {"x": np.array([[3, 1], [1, 2]], np.float16)}, opset=22)["y"]
    assert y.dtype == np.float16
    assert y.item() == 5.0


def _dims(text: str, attributes: str) -> str:
    dims = "N" if "keepdims=0" in attributes else "M, N, O"
    return text.replace("(float[N] y)", f"(float[{dims}] y)")
