"""Floats of 8 bits: against their definition, by brute force, and against ONNX Runtime."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.quant.arithmetic import dequantize, quantize
from qcompiler.quant.float_codes import FIRST_STEP, round_e4m3, squared_error_integral
from qcompiler.quant.granularity import Granularity, PerAxis, PerTensor
from qcompiler.quant.qtype import FP8
from qcompiler.quant.ranges import RangeMethod, quantize_slice, quantize_tensor
from qcompiler.quant.scheme import QSpec
from tests.support.graphs import build
from tests.support.parity import run_model

Array = npt.NDArray[Any]
POSITIVE = [m * FIRST_STEP for m in range(8)]
POSITIVE += [(8 + m) * 2.0**e for e in range(-9, 6) for m in range(8)][:-1]
"""By definition: bias 7, 3 bits of mantissa, the last pattern is NaN."""


def nearest(value: float) -> float:
    """Return the nearest number, half to the even place, saturating."""
    size = min(abs(value), POSITIVE[-1])
    place = min(range(len(POSITIVE)), key=lambda i: (abs(POSITIVE[i] - size), i % 2))
    return float(np.copysign(POSITIVE[place], value))


def test_the_numbers_are_those_of_the_definition() -> None:
    assert (len(POSITIVE), POSITIVE[-1], FP8.qmax) == (127, 448.0, 448)
    values = np.array(POSITIVE, np.float32)
    rounded = np.empty_like(values)
    round_e4m3(values, rounded)
    np.testing.assert_array_equal(rounded, values)


@given(st.floats(-448, 448, width=32) | st.integers(-896, 896).map(lambda n: n / 2))
def test_values_go_to_the_nearest_number(value: float) -> None:
    value = float(np.clip(value, -448, 448))
    out = np.empty(1, np.float32)
    round_e4m3(np.array([value], np.float32), out)
    assert out[0] == nearest(value)


@pytest.mark.parametrize("end", [FIRST_STEP / 3, 0.02, 1.0, 17.3, 448.0, 600.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_integral_is_that_of_the_squared_error(end: float, sign: int) -> None:
    t = np.linspace(0, sign * end, 400_001)
    codes = np.clip(t, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = np.trapezoid((t - codes) ** 2, t)
    assert squared_error_integral(np.array([sign * end]))[0] == pytest.approx(expected, rel=1e-3)


def runtime(values: Array, scale: Array, axis: int | None) -> Array:
    """Return what ONNX Runtime makes of values behind a Q/DQ pair."""
    element = ir.DataType.from_numpy(values.dtype)
    name = {"FLOAT": "float", "FLOAT16": "float16"}[element.name]
    at = "" if axis is None else f"<axis={axis}>"
    shape = ",".join(map(str, values.shape))
    text = f"""g ({name}[{shape}] x) => ({name}[{shape}] y) {{
        q = QuantizeLinear{at}(x, s, z) y = DequantizeLinear{at}(q, s, z) }}"""
    zeros = ir.tensor(np.zeros(scale.shape, ml_dtypes.float8_e4m3fn))
    model = build(text, {"s": ir.tensor(scale, dtype=element), "z": zeros}, opset=21)
    return run_model(model, {"x": values})["y"]


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerAxis(1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_rounds_as_onnx_runtime(granularity: Granularity, dtype: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    shape = {PerTensor(): (), PerAxis(0): (40,), PerAxis(1): (64,)}[granularity]
    scale = np.asarray(generator.uniform(0.01, 0.1, shape), dtype)
    size = np.exp(generator.uniform(-12, 6, (40, 64)))
    values = (generator.choice([-1, 1], (40, 64)) * size).astype(dtype)
    values[0, :4] = 448 * scale.flat[0], 464 * scale.flat[0], -9000, 0
    spec = QSpec(FP8, granularity, symmetric=True)
    codes = quantize(values, scale, None, spec)
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    found = dequantize(codes, scale, None, granularity)
    axis = granularity.axis if isinstance(granularity, PerAxis) else None
    np.testing.assert_array_equal(found, runtime(values, scale, axis))


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1)], ids=str)
def test_the_scale_of_the_whole_range_is_the_largest_value_by_448(granularity: Granularity) -> None:
    values = np.random.default_rng(0).standard_normal((96, 32)).astype(np.float32)
    found = quantize_tensor(values, QSpec(FP8, granularity, True), RangeMethod.MIN_MAX, np.float32)
    axis = None if isinstance(granularity, PerTensor) else 0
    np.testing.assert_array_equal(found.scale, np.abs(values).max(axis=axis) / np.float32(448))
    assert found.zero_point is None
    assert np.abs(found.codes.astype(np.float32)).max() == 448
    restored = dequantize(found.codes, found.scale, None, granularity).astype(np.float64)
    assert found.squared_error == pytest.approx(np.square(restored - values).sum(), rel=1e-5)


@pytest.mark.parametrize("method", [RangeMethod.MSE, RangeMethod.WEIGHTED_MSE])
def test_a_search_is_never_worse_than_the_whole_range(method: RangeMethod) -> None:
    values = np.random.default_rng(1).standard_t(4, (512, 64)).astype(np.float32)
    spec = QSpec(FP8, PerAxis(1), True)
    whole = quantize_tensor(values, spec, RangeMethod.MIN_MAX, np.float32)
    searched = quantize_tensor(values, spec, method, np.float32)
    assert searched.squared_error < 0.99 * whole.squared_error
    restored = dequantize(searched.codes, searched.scale, None, spec.granularity)
    error = np.square(restored.astype(np.float64) - values).sum()
    assert searched.squared_error == pytest.approx(error, rel=1e-5)


def test_slices_that_share_a_scale_have_the_codes_of_the_whole() -> None:
    values = np.random.default_rng(2).standard_normal((64, 16)).astype(np.float32)
    spec = QSpec(FP8, PerTensor(), True)
    whole = quantize_tensor(values, spec, RangeMethod.MIN_MAX, np.float32)
    part = quantize_slice(values[8:24], spec, whole.scale)
    np.testing.assert_array_equal(part.codes, whole.codes[8:24])
