"""Choosing ranges: against the reference arithmetic, and against searches on a grid."""

import math
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.quant.arithmetic import dequantize, quantize
from qcompiler.quant.granularity import Granularity, PerAxis, PerBlock, PerTensor, scale_shape
from qcompiler.quant.qtype import (
    INT2,
    INT3,
    INT4,
    INT8,
    UINT2,
    UINT3,
    UINT4,
    UINT8,
    QType,
)
from qcompiler.quant.ranges import QuantizedTensor, RangeMethod, quantize_tensor, sqnr_db
from qcompiler.quant.scheme import QSpec

Array = np.ndarray[Any, np.dtype[Any]]

SYMMETRIC = (INT8, INT4, INT3, INT2)
ASYMMETRIC = (UINT8, UINT4, UINT3, UINT2)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CASES: tuple[tuple[tuple[int, ...], Granularity], ...] = (
    ((40, 24), PerTensor()),
    ((40, 24), PerAxis(0)),
    ((40, 24), PerAxis(1)),
    ((64, 24), PerBlock(0, 32)),
    ((70, 24), PerBlock(0, 32)),
    ((24, 70), PerBlock(1, 32)),
    ((6, 5, 3, 3), PerAxis(0)),
    ((6, 40, 3, 3), PerBlock(1, 16)),
    ((3, 40, 7), PerBlock(1, 16)),
    ((3, 8, 7), PerAxis(1)),
    ((40,), PerBlock(0, 16)),
    ((3, 600, 2), PerAxis(0)),
)
every_case = pytest.mark.parametrize(("shape", "granularity"), CASES, ids=str)
every_qtype = pytest.mark.parametrize("qtype", SYMMETRIC + ASYMMETRIC, ids=str)
every_method = pytest.mark.parametrize("method", RangeMethod, ids=str)


def _spec(qtype: QType, granularity: Granularity) -> QSpec:
    return QSpec(qtype, granularity, symmetric=qtype.signed)


def _weights(shape: tuple[int, ...], seed: int = 0, tail: float = 4) -> Array:
    generator = np.random.default_rng(seed)
    return (generator.standard_t(tail, shape) * 0.02).astype(np.float32)


def _group_errors(values: Array, result: QuantizedTensor, granularity: Granularity) -> Array:
    """Return the squared error of each scale group, in float64."""
    scale = result.scale.astype(np.float32)
    back = dequantize(result.codes, scale, result.zero_point, granularity)
    squares = np.square(values.astype(np.float64) - back)
    match granularity:
        case PerTensor():
            return np.asarray(squares.sum())
        case PerAxis(axis):
            others = tuple(index for index in range(squares.ndim) if index != axis)
            return np.asarray(squares.sum(axis=others))
        case PerBlock(axis, size):
            starts = range(0, values.shape[axis], size)
            return np.asarray(np.add.reduceat(squares, starts, axis=axis))


@every_case
@every_qtype
@every_method
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_codes_are_those_of_the_reference_arithmetic(
    shape: tuple[int, ...], granularity: Granularity, qtype: QType, method: RangeMethod, dtype: str
) -> None:
    values = _weights(shape)
    spec = _spec(qtype, granularity)

    result = quantize_tensor(values, spec, method, dtype)

    assert result.codes.shape == shape
    assert result.codes.dtype == (np.int8 if qtype.signed else np.uint8)
    assert result.scale.shape == scale_shape(shape, granularity)
    assert result.scale.dtype == dtype
    assert (result.zero_point is None) == qtype.signed
    if result.zero_point is not None:
        assert result.zero_point.shape == result.scale.shape
        assert result.zero_point.dtype == result.codes.dtype
    expected = quantize(values, result.scale, result.zero_point, spec)
    np.testing.assert_array_equal(result.codes, expected)


@every_case
@every_qtype
@every_method
def test_error_and_signal_are_what_they_say(
    shape: tuple[int, ...], granularity: Granularity, qtype: QType, method: RangeMethod
) -> None:
    values = _weights(shape)
    result = quantize_tensor(values, _spec(qtype, granularity), method, np.float32)
    error = float(_group_errors(values, result, granularity).sum())
    assert result.squared_error == pytest.approx(error, rel=1e-4)
    signal = float(np.square(values.astype(np.float64)).sum())
    assert result.squared_signal == pytest.approx(signal, rel=1e-5)


@every_case
@every_qtype
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_mse_is_never_worse_than_min_max(
    shape: tuple[int, ...], granularity: Granularity, qtype: QType, dtype: str
) -> None:
    scale_dtype = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    spec = _spec(qtype, granularity)
    for seed, tail in enumerate((2.1, 4, 50)):
        values = _weights(shape, seed, tail)
        whole = quantize_tensor(values, spec, RangeMethod.MIN_MAX, scale_dtype)
        clipped = quantize_tensor(values, spec, RangeMethod.MSE, scale_dtype)
        before = _group_errors(values, whole, granularity)
        after = _group_errors(values, clipped, granularity)
        assert (after <= before).all()


DISTRIBUTIONS = ("gauss", "laplace", "student", "uniform", "skewed")


def _draw(kind: str, shape: tuple[int, ...]) -> Array:
    generator = np.random.default_rng(7)
    match kind:
        case "gauss":
            wide = generator.standard_normal(shape)
        case "laplace":
            wide = generator.laplace(size=shape)
        case "student":
            wide = generator.standard_t(4, shape)
        case "uniform":
            wide = generator.uniform(-1, 1, shape)
        case _:
            wide = generator.gamma(2, size=shape) - 1
    return wide.astype(np.float32)


def _grid_error(values: Array, qtype: QType, points: int) -> float:
    """Return the least squared error of a grid of clip ratios from 1 down to 0.2."""
    scale = np.maximum(values.max(0) / qtype.qmax, values.min(0) / qtype.qmin)
    best = np.full(values.shape[1], np.inf)
    for ratio in np.linspace(1, 0.2, points):
        step = (scale * ratio).astype(np.float32)
        codes = np.clip(np.rint(values / step), qtype.qmin, qtype.qmax)
        best = np.minimum(best, np.square(values - codes * step).sum(0))
    return float(best.sum())


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize(("qtype", "block"), [(INT4, 32), (INT4, 128), (INT3, 128), (INT2, 64)])
def test_mse_keeps_up_with_grid_searches(kind: str, qtype: QType, block: int) -> None:
    values = _draw(kind, (block, 1500))
    result = quantize_tensor(values, _spec(qtype, PerBlock(0, block)), RangeMethod.MSE, np.float32)
    beats_coarse = result.squared_error <= _grid_error(values, qtype, 20)
    near_fine = result.squared_error <= 1.01 * _grid_error(values, qtype, 200)
    assert beats_coarse or near_fine


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize(("qtype", "block"), [(UINT4, 128), (UINT3, 128), (UINT2, 64)])
def test_asymmetric_mse_keeps_up_with_a_grid_over_the_same_zero_point(
    kind: str, qtype: QType, block: int
) -> None:
    values = _draw(kind, (block, 1500))
    spec = _spec(qtype, PerBlock(0, block))
    whole = quantize_tensor(values, spec, RangeMethod.MIN_MAX, np.float32)
    assert whole.zero_point is not None
    best = np.full(values.shape[1], np.inf)
    for ratio in np.linspace(1, 0.2, 20):
        scale = (whole.scale * ratio).astype(np.float32)
        codes = quantize(values, scale, whole.zero_point, spec)
        back = dequantize(codes, scale, whole.zero_point, spec.granularity)
        best = np.minimum(best, np.square(values - back).sum(0))
    result = quantize_tensor(values, spec, RangeMethod.MSE, np.float32)
    assert result.squared_error < 1.005 * best.sum()


def _weighted_errors(values: Array, restored: Array, block: int) -> Array:
    """Return sum((|v| + rms) (v - restored)²) of the blocks along axis 0, `[blocks, columns]`."""
    groups = values.astype(np.float64).reshape(-1, block, values.shape[1])
    error = (groups - restored.astype(np.float64).reshape(groups.shape)) ** 2
    rms = np.sqrt(np.square(groups).mean(axis=1, keepdims=True))
    return np.asarray(((np.abs(groups) + rms) * error).sum(axis=1))


def _weighted_grid_errors(values: Array, qtype: QType, block: int) -> Array:
    """Return the least weighted error of 100 clip ratios, each with its least-squares scale."""
    spec = _spec(qtype, PerBlock(0, block))
    base = quantize_tensor(values, spec, RangeMethod.MIN_MAX, np.float32)
    low, high = qtype.qmin, qtype.qmax
    groups = values.astype(np.float64).reshape(-1, block, values.shape[1])
    weight = np.abs(groups) + np.sqrt(np.square(groups).mean(axis=1, keepdims=True))
    zero = 0.0 if base.zero_point is None else base.zero_point[:, None].astype(np.float64)
    best = np.full(base.scale.shape, np.inf)
    for ratio in np.linspace(1, 0.3, 100):
        scale = base.scale[:, None].astype(np.float64) * ratio
        steps = np.clip(np.rint(groups / scale) + zero, low, high) - zero
        squares = np.maximum((weight * steps**2).sum(axis=1, keepdims=True), 1e-30)
        fitted = (weight * steps * groups).sum(axis=1, keepdims=True) / squares
        fitted = np.where(fitted > 0, fitted, scale)
        steps = np.clip(np.rint(groups / fitted) + zero, low, high) - zero
        best = np.minimum(best, (weight * (groups - steps * fitted) ** 2).sum(axis=1))
    return best


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("qtype", "block"),
    [(INT4, 128), (UINT4, 32), (INT3, 64), (UINT3, 128), (INT2, 64), (UINT2, 64)],
)
def test_weighted_mse_is_never_worse_than_min_max_and_near_a_fine_grid(
    kind: str, qtype: QType, block: int
) -> None:
    values = _draw(kind, (512, 64))
    spec = _spec(qtype, PerBlock(0, block))
    errors = {}
    for method in RangeMethod:
        made = quantize_tensor(values, spec, method, np.float32)
        restored = dequantize(made.codes, made.scale, made.zero_point, spec.granularity)
        errors[method] = _weighted_errors(values, restored, block)
    weighted = errors[RangeMethod.WEIGHTED_MSE]
    assert (weighted <= errors[RangeMethod.MIN_MAX] * (1 + 1e-5)).all()
    assert weighted.sum() < errors[RangeMethod.MSE].sum() * 1.001
    assert weighted.sum() < _weighted_grid_errors(values, qtype, block).sum() * 1.03


def test_weighted_mse_is_mse_at_8_bits() -> None:
    values = _weights((64, 24))
    spec = _spec(INT8, PerAxis(1))
    plain = quantize_tensor(values, spec, RangeMethod.MSE, np.float32)
    weighted = quantize_tensor(values, spec, RangeMethod.WEIGHTED_MSE, np.float32)
    np.testing.assert_array_equal(weighted.codes, plain.codes)
    np.testing.assert_array_equal(weighted.scale, plain.scale)


@every_qtype
@every_method
@settings(max_examples=8, deadline=None, derandomize=True)
@given(start=st.integers(0, 22), width=st.integers(1, 23), seed=st.integers(0, 99))
def test_a_slice_between_groups_is_quantized_like_the_whole(
    qtype: QType, method: RangeMethod, start: int, width: int, seed: int
) -> None:
    part = slice(start, start + width)
    tall = _weights((70, 23), seed)
    for values, granularity in ((tall, PerBlock(0, 32)), (tall, PerAxis(1))):
        spec = _spec(qtype, granularity)
        whole = quantize_tensor(values, spec, method, np.float16)
        piece = quantize_tensor(values[:, part], spec, method, np.float16)
        _assert_same(piece, whole, (slice(None), part), granularity)
        spec = _spec(qtype, PerBlock(1, 32) if isinstance(granularity, PerBlock) else PerAxis(0))
        wide = quantize_tensor(values.T, spec, method, np.float16)
        np.testing.assert_array_equal(wide.codes, whole.codes.T)
        piece = quantize_tensor(values.T[part], spec, method, np.float16)
        _assert_same(piece, wide, (part, slice(None)), granularity)


def _assert_same(
    piece: QuantizedTensor,
    whole: QuantizedTensor,
    place: tuple[slice, slice],
    granularity: Granularity,
) -> None:
    np.testing.assert_array_equal(piece.codes, whole.codes[place])
    kept = place if isinstance(granularity, PerBlock) else place[place[0] == slice(None)]
    np.testing.assert_array_equal(piece.scale, whole.scale[kept])
    if whole.zero_point is not None and piece.zero_point is not None:
        np.testing.assert_array_equal(piece.zero_point, whole.zero_point[kept])


@every_method
def test_tall_groups_are_summed_the_same_in_any_slice(method: RangeMethod) -> None:
    values = _weights((5000, 3))
    spec = _spec(INT4, PerAxis(1))
    whole = quantize_tensor(values, spec, method, np.float32)
    for column in range(3):
        piece = quantize_tensor(values[:, column : column + 1], spec, method, np.float32)
        np.testing.assert_array_equal(piece.scale, whole.scale[column : column + 1])
        np.testing.assert_array_equal(piece.codes, whole.codes[:, column : column + 1])


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
@every_method
def test_half_types_give_what_their_float32_values_give(
    dtype: np.dtype[Any], method: RangeMethod
) -> None:
    values = _weights((70, 24)).astype(dtype)
    spec = _spec(INT4, PerBlock(0, 32))
    narrow = quantize_tensor(values, spec, method, dtype)
    wide = quantize_tensor(values.astype(np.float32), spec, method, dtype)
    np.testing.assert_array_equal(narrow.codes, wide.codes)
    np.testing.assert_array_equal(narrow.scale, wide.scale)


@every_qtype
@every_method
def test_groups_of_zeros_have_scale_one_and_code_zero_point(
    qtype: QType, method: RangeMethod
) -> None:
    values = _weights((64, 6))
    values[:32, 2] = 0
    result = quantize_tensor(values, _spec(qtype, PerBlock(0, 32)), method, np.float16)
    assert result.scale[0, 2] == 1
    zero = 0 if result.zero_point is None else result.zero_point[0, 2]
    assert (result.codes[:32, 2] == zero).all()


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32)], ids=str)
@every_method
def test_scales_stay_normal_and_finite(dtype: np.dtype[Any], method: RangeMethod) -> None:
    limits: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    values = np.zeros((32, 3), np.float32)
    values[:, 0] = 1e-42
    values[:, 1] = np.linspace(-3e38, 3e38, 32)
    values[:, 2] = np.linspace(-1, 1, 32)
    for qtype in (INT4, UINT4):
        result = quantize_tensor(values, _spec(qtype, PerBlock(0, 32)), method, dtype)
        scale = result.scale.astype(np.float64)
        assert (scale >= float(limits.smallest_normal)).all()
        assert np.isfinite(scale).all()
        expected = quantize(values, result.scale, result.zero_point, _spec(qtype, PerBlock(0, 32)))
        np.testing.assert_array_equal(result.codes, expected)


def test_min_max_uses_the_whole_signed_range() -> None:
    spec = _spec(INT4, PerTensor())
    down = quantize_tensor(np.array([-8, 3], np.float32), spec, RangeMethod.MIN_MAX, np.float32)
    assert (down.scale.item(), down.codes.tolist()) == (1, [-8, 3])
    up = quantize_tensor(np.array([-3, 7], np.float32), spec, RangeMethod.MIN_MAX, np.float32)
    assert (up.scale.item(), up.codes.tolist()) == (1, [-3, 7])


def test_asymmetric_ranges_hold_zero() -> None:
    spec = _spec(UINT4, PerTensor())
    values = np.array([3, 15], np.float32)
    result = quantize_tensor(values, spec, RangeMethod.MIN_MAX, np.float32)
    assert _whole(result) == (1, 0, [3, 15])
    result = quantize_tensor(-values, spec, RangeMethod.MIN_MAX, np.float32)
    assert _whole(result) == (1, 15, [12, 0])


def _whole(result: QuantizedTensor) -> tuple[float, int | None, list[int]]:
    zero = None if result.zero_point is None else int(result.zero_point)
    return float(result.scale), zero, result.codes.tolist()


def test_symmetric_unsigned_types_have_their_zero_point_in_the_middle() -> None:
    values = _weights((64, 8))
    granularity = PerBlock(0, 32)
    signed = quantize_tensor(values, _spec(INT4, granularity), RangeMethod.MSE, np.float32)
    unsigned = quantize_tensor(
        values, QSpec(UINT4, granularity, symmetric=True), RangeMethod.MSE, np.float32
    )
    assert unsigned.zero_point is not None
    assert (unsigned.zero_point == 8).all()
    np.testing.assert_array_equal(unsigned.scale, signed.scale)
    np.testing.assert_array_equal(unsigned.codes.astype(int) - 8, signed.codes)


@every_method
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 69])
def test_values_that_are_not_finite_are_refused(method: RangeMethod, bad: float, row: int) -> None:
    values = _weights((70, 24))
    values[row, 3] = bad
    for granularity in (PerBlock(0, 32), PerAxis(0), PerTensor()):
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize_tensor(values, _spec(INT4, granularity), method, np.float32)


def test_other_float_types_are_refused() -> None:
    spec = _spec(INT8, PerTensor())
    with pytest.raises(ValueError, match="values are float64"):
        quantize_tensor(np.ones(3), spec, RangeMethod.MSE, np.float32)
    with pytest.raises(ValueError, match="scales are float64"):
        quantize_tensor(np.ones(3, np.float32), spec, RangeMethod.MSE, np.float64)


@every_method
@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), PerBlock(0, 16)], ids=str)
def test_empty_tensors_have_no_error(method: RangeMethod, granularity: Granularity) -> None:
    result = quantize_tensor(np.ones((0, 4), np.float32), _spec(UINT4, granularity), method, "f4")
    assert result.codes.shape == (0, 4)
    assert (result.scale == 1).all()
    assert (result.squared_error, result.squared_signal) == (0, 0)


def test_sqnr_in_decibels() -> None:
    assert sqnr_db(100, 1) == pytest.approx(20)
    assert sqnr_db(1, 0) == math.inf
    assert sqnr_db(0, 1) == -math.inf


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("granularity", [PerBlock(0, 128), PerBlock(1, 128), PerAxis(1)], ids=str)
def test_memory_is_the_result_and_a_few_megabytes(granularity: Granularity, dtype: str) -> None:
    values = _weights((4096, 2048)).astype(dtype)[:, 512:1536]
    tracemalloc.start()
    result = quantize_tensor(values, _spec(INT4, granularity), RangeMethod.MSE, np.float16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < result.codes.nbytes + result.scale.nbytes + 12 * 2**20
