"""Rescaling channels of linear ops gives what the ops would give on rescaled data."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.ir.editing import value_names
from qcompiler.ir.linear_ops import LinearOp, NotFoldableError, cast_finite, per_channel
from qcompiler.ir.weights import WeightStore
from tests.support.graphs import build, initializer, node_named, random_array
from tests.support.parity import run_model

_CASES = {
    "Conv": ("Conv(x, w)", (6, 4, 3, 3), 4, 6),
    "grouped Conv": ("Conv<group=2>(x, w)", (6, 2, 3, 3), 4, 6),
    "depthwise Conv": ("Conv<group=4>(x, w)", (4, 1, 3, 3), 4, 4),
    "ConvTranspose": ("ConvTranspose(x, w)", (4, 6, 3, 3), 4, 6),
    "grouped ConvTranspose": ("ConvTranspose<group=2>(x, w)", (4, 3, 3, 3), 4, 6),
    "Gemm": ("Gemm<alpha=0.5>(x, w)", (4, 6), 4, 6),
    "Gemm transB": ("Gemm<transB=1>(x, w)", (6, 4), 4, 6),
    "MatMul": ("MatMul(x, w)", (4, 6), 4, 6),
}


def _model(name: str) -> tuple[ir.Model, npt.NDArray[Any]]:
    """Return a model of one op `p`, and data for it."""
    text, shape, channels, _ = _CASES[name]
    size = (2, channels, 5, 5) if len(shape) == 4 else (2, channels)
    dims = ",".join(str(value) for value in size)
    model = build(f"g (float[{dims}] x) => (y) {{ [p] y = {text} }}", {"w": random_array(*shape)})
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return model, random_array(*size, seed=1)


def _along_channels(values: npt.NDArray[Any], rank: int) -> npt.NDArray[Any]:
    return values.reshape(1, -1, *(1,) * (rank - 2)).astype(np.float32)


@pytest.mark.parametrize("name", _CASES)
def test_channels_are_counted_over_all_groups(name: str) -> None:
    op = LinearOp.of(node_named(_model(name)[0], "p"))
    assert (op.channels_in, op.channels_out) == _CASES[name][2:]


@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize("side", ["in", "out"])
def test_factors_in_the_weight_are_factors_of_the_channels(
    name: str, side: str, tmp_path: Path
) -> None:
    model, x = _model(name)
    y = run_model(model, {"x": x})["y"]
    op = LinearOp.of(node_named(model, "p"))
    scale = np.arange(1.0, 1.0 + (op.channels_in if side == "in" else op.channels_out))
    factors = op.input_factors(scale) if side == "in" else op.output_factors(scale)
    weight = op.scaled_weight(factors)
    op.write(weight, np.zeros(op.channels_out, np.float32), WeightStore(tmp_path), "b", set())
    wide = _along_channels(scale, x.ndim)
    found = run_model(model, {"x": x / wide if side == "in" else x})["y"]
    # Sums of at most 36 float32 products of size about 10.
    np.testing.assert_allclose(found, y if side == "in" else y * wide, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in _CASES if "Transpose" not in name])
def test_a_shift_of_the_input_adds_to_the_bias(name: str, tmp_path: Path) -> None:
    model, x = _model(name)
    op = LinearOp.of(node_named(model, "p"))
    shift = np.linspace(-2, 3, op.channels_in)
    expected = run_model(model, {"x": x + _along_channels(shift, x.ndim)})["y"]
    bias = (op.read_bias() + op.shift_of_inputs(shift)).astype(np.float32)
    added = op.write(initializer(model, "w"), bias, WeightStore(tmp_path), "b", value_names(model))
    assert (added is not None) == (name == "MatMul")
    found = run_model(model, {"x": x})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_add_behind_a_matmul_is_its_bias() -> None:
    text = "g (float[N,4] x) => (float[N,6] y) { [p] t = MatMul(x, w) [a] y = Add(b, t) }"
    model = build(text, {"w": random_array(4, 6), "b": random_array(6)})
    op = LinearOp.of(node_named(model, "p"))
    assert op.adder is node_named(model, "a")
    assert op.output.name == "y"
    np.testing.assert_array_equal(op.read_bias(), initializer(model, "b").astype(np.float64))


@pytest.mark.parametrize(
    ("body", "shape", "reason"),
    [
        ("[p] y = Relu(x)", (4, 6), "Relu has no weight to fold into"),
        ("v = Relu(w) [p] y = MatMul(x, v)", (4, 6), "the weight is computed at run time"),
        ("[p] y = MatMul(x, w)", (2, 4, 6), "the weight of the MatMul is not a matrix"),
        ("[p] y = Conv(x, w)", (4, 6), "Conv has no weights of 2 axes"),
        ("[p] y = MatMul(x, w) z = Relu(w)", (4, 6), "the weight w is read elsewhere too"),
        ("[p] y = Gemm(x, w, x)", (4, 6), "the bias is computed at run time"),
        ("[p] y = Gemm(x, w, m)", (4, 6), "the bias is not one number per output channel"),
    ],
)
def test_refuses_other_forms(body: str, shape: tuple[int, ...], reason: str) -> None:
    text = f"g (float[N,4] x) => (float[N,6] y) {{ {body} }}"
    model = build(text, {"w": random_array(*shape), "m": random_array(2, 6)})
    with pytest.raises(NotFoldableError, match=reason):
        LinearOp.of(node_named(model, "p"))


@pytest.mark.parametrize(
    ("shape", "after", "found"),
    [
        ((3, 1, 1), 2, True),
        ((1, 3, 1, 1), 2, True),
        ((3,), 0, True),
        ((), 2, True),
        ((3,), 1, False),  # along the last axis, which is not that of the channels
        ((2, 3, 1, 1), 2, False),
        ((1, 1, 3, 1, 1), 2, False),
        ((2,), 0, False),
    ],
)
def test_operands_per_channel(shape: tuple[int, ...], after: int, found: bool) -> None:
    vector = per_channel(ir.tensor(random_array(*shape)), 3, after=after)
    assert (vector is not None) == found
    if vector is not None:
        np.testing.assert_array_equal(
            vector, np.broadcast_to(random_array(*shape).reshape(-1), (3,))
        )


def test_a_cast_keeps_infinity_and_refuses_to_make_one() -> None:
    half = np.dtype(np.float16)
    assert np.isinf(cast_finite(np.array([np.inf]), half)).all()
    with pytest.raises(NotFoldableError, match="beyond the range of float16"):
        cast_finite(np.array([1e5]), half)
