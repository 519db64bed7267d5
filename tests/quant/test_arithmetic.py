"""The reference arithmetic against ONNX Runtime's kernels, optimizations off, exact equality."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qcompiler.quant.arithmetic import dequantize, quantize, round_scale
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor, scale_shape
from qcompiler.quant.packing import pack
from qcompiler.quant.qtype import INT2, INT4, INT8, UINT2, UINT4, UINT8, QType
from qcompiler.quant.scheme import QSpec

Array = np.ndarray[Any, np.dtype[Any]]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    BFLOAT16: TensorProto.BFLOAT16,
}
QTYPES = (INT8, UINT8, INT4, UINT4, INT2, UINT2)
GRANULARITIES = (
    PerTensor(),
    PerAxis(0),
    PerAxis(1),
    PerAxis(2),
    PerBlock(0, 2),
    PerBlock(1, 4),
    PerBlock(1, 3),  # ragged: 8 = 3 + 3 + 2
    PerBlock(2, 16),  # one ragged block
)
SHAPE = (4, 8, 5)

every_qtype = pytest.mark.parametrize("qtype", QTYPES, ids=str)
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
both_floats = pytest.mark.parametrize("dtype", ["float32", "float16"])


def _attributes(granularity: Granularity) -> dict[str, Any]:
    match granularity:
        case PerTensor():
            return {}
        case PerAxis(axis):
            return {"axis": axis}
        case PerBlock(axis, block_size):
            return {"axis": axis, "block_size": block_size}


def _constant(name: str, values: Array) -> onnx.TensorProto:
    onnx_type = FLOAT_TYPES[values.dtype]
    return helper.make_tensor(name, onnx_type, values.shape, values.tobytes(), raw=True)


def _codes(name: str, codes: Array, qtype: QType) -> onnx.TensorProto:
    raw = pack(codes, qtype.storage_bits).tobytes()
    onnx_type = TensorProto.DataType.Value(qtype.onnx_name)
    return helper.make_tensor(name, onnx_type, codes.shape, raw, raw=True)


def _session(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    output: onnx.ValueInfoProto,
    constants: list[onnx.TensorProto],
    opset: int = 25,
) -> onnxruntime.InferenceSession:
    graph = helper.make_graph(nodes, "g", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=13)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _runtime_quantize(values: Array, scale: Array, zero: Array, spec: QSpec) -> Array:
    """Run QuantizeLinear; codes come out through a DequantizeLinear of scale 1."""
    qtype = spec.qtype
    nodes = [
        helper.make_node(
            "QuantizeLinear", ["x", "scale", "zero"], ["q"], **_attributes(spec.granularity)
        ),
        helper.make_node("DequantizeLinear", ["q", "one"], ["y"]),
    ]
    session = _session(
        nodes,
        [helper.make_tensor_value_info("x", FLOAT_TYPES[values.dtype], values.shape)],
        helper.make_tensor_value_info("y", TensorProto.FLOAT, values.shape),
        [
            _constant("scale", scale),
            _codes("zero", zero, qtype),
            _constant("one", np.ones((), np.float32)),
        ],
    )
    return np.asarray(session.run(None, {"x": values})[0])


def _runtime_dequantize(
    codes: Array, scale: Array, zero: Array, qtype: QType, granularity: Granularity
) -> Array:
    node = helper.make_node(
        "DequantizeLinear", ["q", "scale", "zero"], ["y"], **_attributes(granularity)
    )
    session = _session(
        [node],
        [],
        helper.make_tensor_value_info("y", FLOAT_TYPES[scale.dtype], codes.shape),
        [_codes("q", codes, qtype), _constant("scale", scale), _codes("zero", zero, qtype)],
    )
    return np.asarray(session.run(None, {})[0])


def _case(
    qtype: QType, granularity: Granularity, dtype: str, seed: int
) -> tuple[Array, Array, Array]:
    """Return values rich in ties and saturation, scales, and zero points."""
    generator = np.random.default_rng(seed)
    shape = scale_shape(SHAPE, granularity)
    scale = generator.uniform(0.01, 2, shape)
    if seed % 2:
        scale = np.exp2(np.rint(np.log2(scale)))  # ties are exact only for round scales
    scale = np.asarray(scale, dtype)
    steps = generator.integers(-2 * qtype.qmax, 2 * qtype.qmax + 1, SHAPE) / 2
    values = (steps * float(scale.flat[0])).astype(dtype)
    noise = generator.standard_normal(SHAPE) * qtype.qmax
    values = np.where(generator.random(SHAPE) < 0.5, values, noise.astype(dtype))
    code_dtype = np.int8 if qtype.signed else np.uint8
    zero = generator.integers(qtype.qmin, qtype.qmax + 1, shape).astype(code_dtype)
    return values, scale, np.asarray(zero)


@every_qtype
@every_granularity
@both_floats
@settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_quantize_gives_the_codes_of_onnx_runtime(
    qtype: QType, granularity: Granularity, dtype: str, seed: int
) -> None:
    values, scale, zero = _case(qtype, granularity, dtype, seed)
    spec = QSpec(qtype, granularity, symmetric=False)

    codes = quantize(values, scale, zero, spec)

    assert codes.dtype == zero.dtype
    np.testing.assert_array_equal(codes, _runtime_quantize(values, scale, zero, spec))


@every_qtype
@every_granularity
@both_floats
@settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_dequantize_gives_the_values_of_onnx_runtime(
    qtype: QType, granularity: Granularity, dtype: str, seed: int
) -> None:
    _, scale, zero = _case(qtype, granularity, dtype, seed)
    generator = np.random.default_rng(seed)
    codes = generator.integers(qtype.qmin, qtype.qmax + 1, SHAPE).astype(zero.dtype)

    values = dequantize(codes, scale, zero, granularity)

    assert values.dtype == dtype
    expected = _runtime_dequantize(codes, scale, zero, qtype, granularity)
    np.testing.assert_array_equal(values, expected)


@every_qtype
def test_onnx_runtime_has_no_bfloat16_kernels(qtype: QType) -> None:
    node = helper.make_node("DequantizeLinear", ["q", "scale"], ["y"])
    with pytest.raises(Exception, match="Could not find an implementation for DequantizeLinear"):
        _session(
            [node],
            [],
            helper.make_tensor_value_info("y", TensorProto.BFLOAT16, (3,)),
            [
                _codes("q", np.zeros(3, np.int8 if qtype.signed else np.uint8), qtype),
                _constant("scale", np.ones((), BFLOAT16)),
            ],
        )
    onnx_type = TensorProto.DataType.Value(qtype.onnx_name)
    node = helper.make_node("QuantizeLinear", ["x", "scale"], ["y"], output_dtype=onnx_type)
    with pytest.raises(Exception, match="Could not find an implementation for QuantizeLinear"):
        _session(
            [node],
            [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, (3,))],
            helper.make_tensor_value_info("y", onnx_type, (3,)),
            [_constant("scale", np.ones((), BFLOAT16))],
        )


@pytest.mark.parametrize("qtype", [INT2, UINT2], ids=str)
def test_two_bits_need_opset_25(qtype: QType) -> None:
    node = helper.make_node("DequantizeLinear", ["q", "scale"], ["y"])
    codes = np.zeros(3, np.int8 if qtype.signed else np.uint8)
    constants = [_codes("q", codes, qtype), _constant("scale", np.ones((), np.float32))]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, (3,))
    _session([node], [], output, constants, opset=25)
    with pytest.raises(Exception, match="int2"):
        _session([node], [], output, constants, opset=24)


@every_granularity
def test_values_and_scales_of_two_types_are_divided_in_float32(granularity: Granularity) -> None:
    values, scale, zero = _case(INT8, granularity, "float32", 4)
    scale = scale.astype(BFLOAT16)
    spec = QSpec(INT8, granularity, symmetric=False)

    codes = quantize(values, scale, zero, spec)

    wide = scale.astype(np.float32)
    np.testing.assert_array_equal(codes, _runtime_quantize(values, wide, zero, spec))


def test_bfloat16_is_divided_in_bfloat16() -> None:
    values, scale, _ = _case(INT8, PerTensor(), "float32", 4)
    values, scale = values.astype(BFLOAT16), scale.astype(BFLOAT16)
    codes = quantize(values, scale, None, QSpec(INT8, PerTensor(), symmetric=True))
    expected = np.clip(np.rint((values / scale).astype(np.float32)), -128, 127)
    np.testing.assert_array_equal(codes, expected)


@every_granularity
def test_bfloat16_products_are_rounded_once(granularity: Granularity) -> None:
    values, scale, zero = _case(INT4, granularity, "float32", 3)
    scale = scale.astype(BFLOAT16)
    codes = quantize(values, scale, zero, QSpec(INT4, granularity, symmetric=False))
    wide_scale = scale.astype(np.float32)
    exact = dequantize(codes, wide_scale, zero, granularity)
    narrow = dequantize(codes, scale, zero, granularity)
    assert narrow.dtype == BFLOAT16
    np.testing.assert_array_equal(narrow, exact.astype(BFLOAT16))


def test_ties_go_to_even_and_the_rest_saturates() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 7.5, 100, -100, 3e38], np.float32)
    spec = QSpec(INT4, PerTensor(), symmetric=True)
    codes = quantize(values, np.array(1, np.float32), None, spec)
    assert codes.tolist() == [0, 2, 2, 0, -2, 7, 7, -8, 7]
    assert quantize(values, np.array(0.5, np.float32), None, spec).tolist()[-1] == 7


def test_the_quotient_is_divided_not_multiplied_by_a_reciprocal() -> None:
    scale = np.float32(0.013)
    ties = ((np.arange(-127, 127, dtype=np.float32) + np.float32(0.5)) * scale).astype(np.float32)
    near = np.nextafter(ties, np.float32(np.inf))
    codes = quantize(near, np.array(scale), None, QSpec(INT8, PerTensor(), symmetric=True))
    by_product = np.clip(np.rint(near * (np.float32(1) / scale)), -128, 127)
    np.testing.assert_array_equal(codes, np.clip(np.rint(near / scale), -128, 127))
    assert (codes != by_product).any()


def test_an_absent_zero_point_is_zero() -> None:
    values, scale, zero = _case(INT8, PerAxis(1), "float32", 5)
    spec = QSpec(INT8, PerAxis(1), symmetric=True)
    codes = quantize(values, scale, None, spec)
    np.testing.assert_array_equal(codes, quantize(values, scale, np.zeros_like(zero), spec))
    np.testing.assert_array_equal(
        dequantize(codes, scale, None, PerAxis(1)),
        dequantize(codes, scale, np.zeros_like(zero), PerAxis(1)),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    values = np.array([1.0, bad], np.float32)
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(values, np.array(1, np.float32), None, QSpec(INT8, PerTensor(), symmetric=True))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_not_positive_are_refused(bad: float) -> None:
    scale = np.array(bad, np.float32)
    with pytest.raises(ValueError, match="not positive and finite"):
        quantize(np.ones(2, np.float32), scale, None, QSpec(INT8, PerTensor(), symmetric=True))
    with pytest.raises(ValueError, match="not positive and finite"):
        dequantize(np.ones(2, np.int8), scale, None, PerTensor())


def test_misfits_are_refused() -> None:
    values, spec = np.ones((4, 6), np.float32), QSpec(INT4, PerBlock(0, 2), symmetric=True)
    with pytest.raises(ValueError, match=r"it takes \[2, 6\]"):
        quantize(values, np.ones((4, 6), np.float32), None, spec)
    with pytest.raises(ValueError, match=r"zero point is outside -8\.\.7"):
        quantize(values, np.ones((2, 6), np.float32), np.full((2, 6), 8, np.int8), spec)
    with pytest.raises(ValueError, match="float64"):
        quantize(values.astype(np.float64), np.ones((2, 6), np.float32), None, spec)
    with pytest.raises(ValueError, match="axis 2 is outside"):
        dequantize(np.ones((4, 6), np.int8), np.ones(4, np.float32), None, PerAxis(2))


def test_empty_tensors_pass() -> None:
    for granularity in (PerTensor(), PerAxis(0), PerBlock(0, 2)):
        scale = np.ones(scale_shape((4, 0), granularity), np.float32)
        spec = QSpec(INT4, granularity, symmetric=True)
        assert quantize(np.ones((4, 0), np.float32), scale, None, spec).shape == (4, 0)


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_rounded_scales_are_usable(dtype: np.dtype[Any]) -> None:
    limits: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    wished = np.array([0, 1e-300, float(limits.smallest_normal) / 2, 0.1, 1e300])
    rounded = round_scale(wished, dtype)
    assert rounded.dtype == dtype
    normal = limits.smallest_normal
    assert rounded.tolist() == [1, normal, normal, np.array(0.1).astype(dtype), limits.max]
